"""`hpcdl resubmit`."""

from __future__ import annotations

import argparse

from hpcdl.verbs._common import CONFIRM_FROM, aside, confirmed

HELP = "runs that ended too early go on from their last checkpoint"
RUNS = "words"


def add(parser: argparse.ArgumentParser) -> None:
    """Its words and options."""
    parser.add_argument(
        "words", nargs="+", metavar="RUN|KEY=VALUE", help="runs or sweeps; cluster.mem_gb=16, …"
    )
    parser.add_argument(
        "--only",
        metavar="STATES",
        help="failed,timeout,oom,node_fail,preempted (the default), cancelled",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted (dry_run=true)")
    parser.add_argument("--yes", action="store_true", help=f"don't ask, even for {CONFIRM_FROM} runs or more")


def run(options: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from hpcdl.launch import resubmit
    from hpcdl.runs import query

    words = [*options.words, *(["dry_run=true"] if options.dry_run else [])]
    chosen = resubmit.choose(words, options.only, query.runs_dir(options.runs_dir))
    if chosen.left_out:
        aside(f"hpcdl: left as they are: {chosen.left_out}")
    for line in chosen.warnings:
        aside(f"hpcdl: warning: {line}")
    ask = chosen.count >= CONFIRM_FROM and not (options.yes or chosen.options.dry_run)
    if ask and not confirmed(chosen.count, "Resubmit", "resubmitted"):
        return 1
    return resubmit.submit(chosen)
