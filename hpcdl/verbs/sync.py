"""`hpcdl sync`."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpcdl.errors import ServerError
from hpcdl.verbs._common import aside, left_out, say

HELP = "send runs to wandb, or make TensorBoard's files of them"
EVERY_S = 60.0
"""Between two looks of --follow."""


def add(parser: argparse.ArgumentParser) -> None:
    """Its words and options."""
    parser.description = (
        "Makes a run's page on a wandb server from the run's own files, with the system metrics of all its nodes; "
        "what is there already is skipped. Run it where the server can be reached; compute nodes need no wandb."
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="or a sweep (default: every run with tracker=wandb)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be sent, and send nothing")
    parser.add_argument("--follow", action="store_true", help="again every minute while the runs go on")
    parser.add_argument("--tensorboard", metavar="DIR", type=Path, help="event files below DIR, and no wandb")
    parser.add_argument("--project", metavar="NAME", help="instead of tracker.project")
    parser.add_argument("--entity", metavar="NAME", help="instead of tracker.entity")
    parser.add_argument(
        "--limit", metavar="S", type=_seconds, default=300.0,
        help="seconds that the server may take to begin, and to take all of a run (default: 300)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    import time

    from hpcdl.runs import query, reconcile
    from hpcdl.runs.store import all_runs
    from hpcdl.sync import push

    folder = query.runs_dir(options.runs_dir)
    wish = push.Wish(
        board=options.tensorboard,
        project=options.project,
        entity=options.entity,
        limit_s=options.limit,
        named=bool(options.runs),
    )
    while True:
        found = query.find_all(options.runs, folder) if options.runs else list(all_runs(folder))
        reading = reconcile.read(found)
        runs = [view.run for view in sorted(reading.views, key=lambda view: view.state.created)]
        if not options.runs and wish.board is None:
            runs = [each for each in runs if push.wants_wandb(each)]
        work = push.Push(wish, say)
        again = options.follow and not options.dry_run and push.active(runs)
        try:
            (work.plan if options.dry_run else work.send)(runs)
        except ServerError as error:
            if not again:
                raise
            aside(f"hpcdl: {error}")
        left_out(reading.faults)
        if not again:
            break
        time.sleep(EVERY_S)
    tally = work.tally
    if not runs:
        aside(f"nothing to send: no run in {folder} has tracker=wandb (`hpcdl sync RUN` sends any run)")
    elif len(runs) > 1 or not options.runs:
        verb = "would be sent" if options.dry_run else "sent"
        more = f", {len(tally.failed)} failed" if tally.failed else ""
        say(f"{tally.sent} {verb}, {tally.there} up to date, {tally.waiting} with nothing yet{more}")
    return 1 if tally.failed else 0


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1.0 <= value <= 86400.0:
        raise argparse.ArgumentTypeError(f"{text!r}: seconds from 1 to 86400")
    return value
