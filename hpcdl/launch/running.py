"""Submits what was planned, and stays with what was asked to be followed."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpcdl.errors import SchedulerError, UsageError
from hpcdl.launch import points, report, submit
from hpcdl.launch.points import Batch, Planned
from hpcdl.launch.sweep import Asked
from hpcdl.runs import private
from hpcdl.runs.query import SWEEPS
from hpcdl.runs.store import SUBMISSIONS, RunDir
from hpcdl.spec import LaunchOptions

if TYPE_CHECKING:
    from rich.console import Console

NEEDED = ("torch", "transformers")
"""Packages without which nothing trains."""
INTERRUPTED = 130


def launch(planned: Sequence[Planned], batches: Sequence[Batch], asked: Asked) -> int:
    """Submits, reports, follows where that was asked for; returns the exit code.

    Points that were refused are told and recorded, and change nothing of the exit code.

    Raises:
        SchedulerError: the scheduler has refused at least one submission; the others were made.
        UsageError: this machine can't train.
    """
    options = asked.options
    folder = points.runs_folder(options)
    for line in private.warnings_about(folder):
        print(f"warning: {line}", file=sys.stderr)
    names = {item.run.path.parent for item in planned}
    with private.made_for(options.readable_by, folder, folder / SUBMISSIONS, folder / SWEEPS, *names):
        return _launch(planned, batches, asked)


def _launch(planned: Sequence[Planned], batches: Sequence[Batch], asked: Asked) -> int:
    options = asked.options
    here = [batch for batch in batches if batch.request.cluster.kind == "local"]
    away = [batch for batch in batches if batch not in here]
    _check_packages(here)
    sweep = submit.record_sweep(planned, asked.refused) if asked.swept else None
    made = [submit.submit(batch, sweep) for batch in (*away, *here[:1])]
    seen = _as_it_went((*away, *here[:1]), made, planned)
    if options.parsable:
        report.parsable(seen, asked.refused)
    elif seen:
        report.launched(seen, asked, sweep)
    refused = [one.refused for one in made if one.refused]
    if refused:
        raise SchedulerError("\n".join(dict.fromkeys(refused)))
    code = _stay_here(here, made[len(away) :], sweep, options)
    if options.wait and code != INTERRUPTED:
        code = max(code, wait_for([item.run for item in seen if _is_away(item)], options))
    return code


def _check_packages(here: Sequence[Batch]) -> None:
    """Said before anything is made: a run that can only fail helps nobody."""
    if not any(batch.request.cluster.python is None for batch in here):
        return
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"this Python can't train: {' and '.join(missing)} missing\n"
            "fix: pip install 'hpcdl[train]', or cluster.python=/path/of/a/python that has it, "
            "or cluster=slurm"
        )


def _as_it_went(
    batches: Sequence[Batch], made: Sequence[submit.Submitted], planned: Sequence[Planned]
) -> list[Planned]:
    """The plan, with the runs that somebody else was quicker with, and less those that were refused."""
    asked = {item.run for batch in batches for item in batch.runs}
    lost = asked - {item.run for one in made for item in one.runs}
    refused = {item.run for one in made if one.refused for item in one.runs}
    return [
        dataclasses.replace(item, action="active") if item.run in lost else item
        for item in planned
        if item.run not in refused
    ]


def _stay_here(
    here: Sequence[Batch], made: Sequence[submit.Submitted], sweep: str | None, options: LaunchOptions
) -> int:
    """Runs of this machine, one after the other; a failed one doesn't keep the next from its turn."""
    if not here:
        return 0
    from hpcdl.runs.follow import exit_code, follow

    worst = 0
    for number, batch in enumerate(here):
        one = made[number] if number < len(made) else submit.submit(batch, sweep)
        for item in one.runs:
            worst = max(worst, exit_code(follow(item.run, on_interrupt="stop", console=_console(options))))
            if worst == INTERRUPTED:
                return worst
    return worst


def _is_away(item: Planned) -> bool:
    return item.action != "done" and (item.spec.cluster.kind != "local" or item.action == "active")


def wait_for(runs: Sequence[RunDir], options: LaunchOptions) -> int:
    """Follows jobs to their end; the worst exit code."""
    if not runs:
        return 0
    from hpcdl.runs.follow import exit_code, follow_all

    return max(exit_code(state) for state in follow_all(runs, console=_console(options)))


def _console(options: LaunchOptions) -> Console | None:
    """Where progress goes: with `parsable`, standard output is for the lines of runs alone."""
    if not options.parsable:
        return None
    from hpcdl.runs import terminal

    return terminal.console(stderr=True, highlight=False)
