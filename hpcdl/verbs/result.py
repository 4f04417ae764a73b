"""`hpcdl result`."""

from __future__ import annotations

import argparse

from hpcdl.verbs._common import console, print_json

HELP = "what a finished run has achieved"
RUNS = "run"


def add(parser: argparse.ArgumentParser) -> None:
    """Its words and options."""
    parser.add_argument("run", metavar="RUN", nargs="?", default="latest", help="(default: latest)")
    parser.add_argument("--json", action="store_true", help="result.json as it is")


def run(options: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from hpcdl.runs import query, result
    from hpcdl.runs.reconcile import look

    view = look(query.find_one(options.run, query.runs_dir(options.runs_dir)))
    record = result.load(view)
    if options.json:
        print_json(record)
    else:
        result.print_result(console(), view, record)
    return 0
