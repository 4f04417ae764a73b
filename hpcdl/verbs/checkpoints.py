"""`hpcdl checkpoints`."""

from __future__ import annotations

import argparse

from hpcdl.verbs._common import console, print_json

HELP = "what a run can go on from; 1 if any of it is damaged"
RUNS = "run"


def add(parser: argparse.ArgumentParser) -> None:
    """Its words and options."""
    parser.add_argument("run", metavar="RUN", nargs="?", default="latest", help="(default: latest)")
    parser.add_argument("--verify", action="store_true", help="read every byte, and compare the checksums")
    parser.add_argument("--json", action="store_true", help="for scripts: a list, the oldest first")


def run(options: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from hpcdl.runs import checkpoints, query

    run = query.find_one(options.run, query.runs_dir(options.runs_dir))
    found = checkpoints.collect(run, verify=options.verify)
    if options.json:
        print_json(checkpoints.as_json(found))
    else:
        checkpoints.print_list(console(), run, found)
    return 1 if any(each.damage for each in found) else 0
