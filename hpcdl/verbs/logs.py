"""`hpcdl logs`."""

from __future__ import annotations

import argparse

from hpcdl.verbs._common import count, remark

HELP = "what a run's ranks print, of all nodes in the order of time"
RUNS = "run"


def add(parser: argparse.ArgumentParser) -> None:
    """Its words and options."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run is over")
    parser.add_argument(
        "--error",
        action="store_true",
        help="only the first error of the first failing rank, and what led to it",
    )
    parser.add_argument("--node", metavar="NAME", help="of this node only")
    parser.add_argument("--rank", type=count, metavar="R", help="of this global rank only")
    parser.add_argument(
        "--try", dest="attempt", metavar="T", help="of this try only: 0, or 0.1 (launch.requeue)"
    )


def run(options: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from hpcdl.runs import logs, query, terminal

    run = query.find_one(options.run, query.runs_dir(options.runs_dir))
    wanted = logs.Wanted(node=options.node, rank=options.rank, attempt=options.attempt)

    def write(line: str) -> None:
        print(terminal.line(line), flush=options.follow)

    if options.error:
        logs.show_error(run, write, remark)
    elif options.follow:
        logs.follow(run, wanted, write, remark)
    else:
        logs.show(run, wanted, write, remark)
    return 0
