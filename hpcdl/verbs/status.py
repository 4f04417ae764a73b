"""`hpcdl status`."""

from __future__ import annotations

import argparse

from hpcdl.errors import UsageError
from hpcdl.verbs._common import console, count, left_out, print_json

HELP = "the last runs as a table, or all about one"
RUNS = "runs"


def add(parser: argparse.ArgumentParser) -> None:
    """Its words and options."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="one run: all about it; several: a table")
    parser.add_argument("--json", action="store_true", help="for scripts: an object for one RUN, else a list")
    parser.add_argument("-n", type=count, default=20, metavar="N", help="rows of the table (default: 20)")
    parser.add_argument("--all", action="store_true", help="every run")


def run(options: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from hpcdl.runs import many, patience, query, status
    from hpcdl.runs.hurry import hurry
    from hpcdl.runs.reconcile import read, reconcile
    from hpcdl.runs.store import all_runs

    folder = query.runs_dir(options.runs_dir)
    reading = query.read_all(options.runs, folder) if options.runs else read(all_runs(folder))
    if options.runs and len(reading.faults) == 1 and not reading.views:
        raise UsageError(reading.faults[0])
    waits = patience.Patience(patience.of_environment(patience.LOOK_S))
    checked = hurry(reconcile(reading.views, patience=waits))
    views = sorted(checked, key=lambda view: view.state.created, reverse=True)
    single = len(options.runs) == 1 and len(views) == 1
    if options.json:
        plain = list(many.each(status.as_json, views))
        print_json(plain[0] if single else plain)
    elif single:
        status.print_detail(console(), views[0])
    elif not views:
        print(
            f"no run yet in {folder}: hpcdl launch starts one; --runs-dir or $HPCDL_RUNS names another folder"
        )
    else:
        rows = views if options.all or options.runs else views[: options.n]
        status.print_table(console(), rows, views)
    left_out(reading.faults)
    return 0
