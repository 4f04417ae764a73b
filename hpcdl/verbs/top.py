"""`hpcdl top`."""

from __future__ import annotations

import argparse

from hpcdl.verbs._common import console, left_out, say

HELP = "active runs live: progress, loss, memory, ranks, logs"
RUNS = "runs"


def add(parser: argparse.ArgumentParser) -> None:
    """Its words and options."""
    parser.add_argument("runs", nargs="*", metavar="RUN|SWEEP", help="these only (default: the active ones)")
    parser.add_argument("--all", action="store_true", help="those that ended over an hour ago, too")
    parser.add_argument("--once", action="store_true", help="one frame as plain text")


def run(options: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    import os
    import sys

    from hpcdl.runs import query
    from hpcdl.top import frame
    from hpcdl.top.watch import Wanted, Watch

    wanted = Wanted(
        folder=query.runs_dir(options.runs_dir), queries=tuple(options.runs), everything=options.all
    )
    query.find_all(wanted.queries, wanted.folder)  # a name that nothing has is told at once
    watch = Watch(wanted)
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if not options.once and terminal:
        from hpcdl.top.app import TopApp

        TopApp(watch).run()
        return 0
    picture = frame.once(watch)
    for line in frame.lines(picture, wanted, console().width):
        say(line)
    left_out(picture.faults)
    return 0
