"""`hpcdl cancel`."""

from __future__ import annotations

import argparse

from hpcdl.verbs._common import CONFIRM_FROM, confirmed, say

HELP = "save a checkpoint and end runs (a name: all its runs)"
RUNS = "runs"


def add(parser: argparse.ArgumentParser) -> None:
    """Its words and options."""
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--now", action="store_true", help="don't wait for a checkpoint")
    parser.add_argument(
        "--limit", type=float, default=120.0, metavar="S", help="longest wait, in seconds (120)"
    )
    parser.add_argument("--yes", action="store_true", help=f"don't ask, even for {CONFIRM_FROM} runs or more")


def run(options: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from hpcdl.runs import cancel, query
    from hpcdl.runs.state import ACTIVE

    runs = query.find_all(options.runs, query.runs_dir(options.runs_dir))
    if len(runs) >= CONFIRM_FROM and not options.yes and not confirmed(len(runs), "Cancel", "cancelled"):
        return 1
    views = cancel.cancel(runs, cancel.How(now=options.now, limit_s=options.limit), say)
    return 1 if any(view.state.state in ACTIVE for view in views) else 0
