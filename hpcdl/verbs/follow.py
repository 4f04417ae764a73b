"""`hpcdl follow`."""

from __future__ import annotations

import argparse

HELP = "progress of runs until they are over; exits as they do"
RUNS = "runs"


def add(parser: argparse.ArgumentParser) -> None:
    """Its words and options."""
    parser.add_argument("runs", nargs="+", metavar="RUN")


def run(options: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from hpcdl.runs import follow, query

    runs = query.find_all(options.runs, query.runs_dir(options.runs_dir))
    if len(runs) == 1:
        # Looking at a run must not be able to end it: that is what cancel is for.
        return follow.exit_code(follow.follow(runs[0], on_interrupt="leave"))
    return max(follow.exit_code(state) for state in follow.follow_all(runs))
