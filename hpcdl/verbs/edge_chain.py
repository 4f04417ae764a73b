"""`hpcdl edge-chain`."""

from __future__ import annotations

import argparse

from hpcdl.verbs._common import console, print_json

HELP = "SmolLM2-135M pruned, distilled, quantized: one job a stage"


def add(parser: argparse.ArgumentParser) -> None:
    """Its words and options."""
    parser.add_argument(
        "words", metavar="KEY=VALUE", nargs="*", default=[],
        help="for every stage: cluster=slurm, wait=true, trainer.precision=fp32, …",
    )  # fmt: skip
    parser.add_argument("--table", metavar="RUN", help="launch nothing: what this run of edge_export came to")
    parser.add_argument("--json", action="store_true", help="the table, for scripts")


def run(options: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from hpcdl.launch import edge

    last = options.table
    if last is None:
        code, last = edge.launch(options.words, options.runs_dir)
        if code or last is None:
            return code
    rows = edge.rows(last, options.runs_dir)
    if options.json:
        print_json(rows)
    else:
        edge.show(console(), rows, last)
    return 0
