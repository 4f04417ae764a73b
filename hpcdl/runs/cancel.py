"""`hpcdl cancel`: ends runs, saving a checkpoint first where there is something to save."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpcdl.errors import SchedulerError
from hpcdl.runs import failure, processes
from hpcdl.runs.files import write_atomic
from hpcdl.runs.judge import NO_LOG
from hpcdl.runs.reconcile import View, read, reconcile
from hpcdl.runs.scheduler import Slurm
from hpcdl.runs.state import ACTIVE
from hpcdl.runs.store import RunDir

LIMIT_S = 120.0
"""How long running workers are waited for: a large checkpoint on a slow disk takes its time."""
POLL_S = 1.0
KILLED_S = 30.0
"""How long the end of a job is waited for once scancel was sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """What the user wants."""

    now: bool = False
    """Don't wait for a checkpoint."""
    limit_s: float = LIMIT_S


def cancel(
    runs: Sequence[RunDir],
    how: How,
    say: Callable[[str], None],
    *,
    slurm: Slurm | None = None,
    poll_s: float = POLL_S,
) -> list[View]:
    """Ends all these runs, and waits until their ends are seen.

    Args:
        runs: which.
        how: at once, or with a checkpoint, and how long that may take.
        say: takes a line for each thing done.
        slurm: whom to ask.
        poll_s: seconds between looks.

    Returns:
        The runs as they stand afterwards; one that is still active did not end within the limit.

    Raises:
        SchedulerError: Slurm could not be reached; nothing was cancelled there.
    """
    slurm = slurm or Slurm()
    views = reconcile(read(runs).views, slurm)
    _require_scheduler(views)
    for view in views:
        if view.state.state not in ACTIVE:
            say(f"{view.state.run_id} is over already: {_state(view)}")
    unsent = [v for v in views if v.state.state in ACTIVE and v.state.kind == "slurm" and not v.state.job_id]
    for view in unsent:
        say(f"{view.state.run_id} is being submitted and has no job id yet: cancel it in a moment")
    active = [view for view in views if view.state.state in ACTIVE and view not in unsent]
    waiting = [view for view in active if _in_queue(view)]
    running = [view for view in active if not _in_queue(view)]
    for view in running:
        _ask_to_stop(view, how, say)
    direct = [*waiting, *(view for view in running if how.now)]
    slurm.cancel([v.state.job_id for v in direct if v.state.kind == "slurm" and v.state.job_id])
    waiting_now = {view.run for view in waiting}
    ended = _wait(direct, KILLED_S, slurm, poll_s)
    gently = _wait([view for view in running if not how.now], how.limit_s, slurm, poll_s)
    ended += _finish(gently, how, slurm, poll_s, say)
    for view in ended:
        never = view.run in waiting_now and not failure.log_files(view.run, view.state.attempt)
        say(f"{view.state.run_id} {_state(view)}{_never_logs(view) if never else ''}")
    final = {view.run: view for view in ended}
    return [final.get(view.run, view) for view in views]


def _require_scheduler(views: Sequence[View]) -> None:
    away = [view.unchecked for view in views if view.state.state == "UNKNOWN" and view.unchecked]
    if away:
        raise SchedulerError(f"Slurm could not be reached, so nothing was cancelled: {away[0]}")


def _in_queue(view: View) -> bool:
    return view.state.kind == "slurm" and view.state.state == "PENDING"


def _ask_to_stop(view: View, how: How, say: Callable[[str], None]) -> None:
    """The STOP file reaches the workers wherever they are; a local agent is told as well."""
    state = view.state
    if how.now:
        if state.kind == "local":
            processes.signal_agent(state, signal.SIGINT)
            time.sleep(0.5)  # two SIGINTs that arrive together count as one
            processes.signal_agent(state, signal.SIGINT)
        return
    write_atomic(view.run.stop_file, f"cancel {os.environ.get('USER', '')}".rstrip() + "\n")
    if state.kind == "local":
        processes.signal_agent(state, signal.SIGINT)
    say(f"{state.run_id} saves a checkpoint and stops …")


def _wait(views: Sequence[View], limit_s: float, slurm: Slurm, poll_s: float) -> list[View]:
    """The runs, each as it was when it had ended, or when the limit was reached."""
    deadline = time.monotonic() + limit_s
    current = list(views)
    while any(view.state.state in ACTIVE for view in current):
        current = [
            v if v.state.state not in ACTIVE else f
            for v, f in zip(current, _fresh(current, slurm), strict=True)
        ]
        if time.monotonic() > deadline:
            break
        if any(view.state.state in ACTIVE for view in current):
            time.sleep(poll_s)
    return current


def _fresh(views: Sequence[View], slurm: Slurm) -> list[View]:
    again = [dataclasses.replace(view, state=view.run.read_state(), unchecked="") for view in views]
    return reconcile(again, slurm)


def _finish(
    views: Sequence[View], how: How, slurm: Slurm, poll_s: float, say: Callable[[str], None]
) -> list[View]:
    """What is left of the jobs is ended: exactly these array tasks, not their siblings."""
    late = [view for view in views if view.state.state in ACTIVE]
    for view in late:
        say(f"{view.state.run_id} has not stopped within {how.limit_s:g} s")
    slurm.cancel([v.state.job_id for v in views if v.state.kind == "slurm" and v.state.job_id])
    on_slurm = _wait([view for view in late if view.state.kind == "slurm"], KILLED_S, slurm, poll_s)
    ended = {view.run: view for view in on_slurm}
    return [ended.get(view.run, view) for view in views]


def _state(view: View) -> str:
    return f"{view.state.state}{': ' + view.state.reason if view.state.reason else ''}"


def _never_logs(view: View) -> str:
    return "" if NO_LOG in view.state.reason else f"; {NO_LOG}"
