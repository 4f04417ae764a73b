"""`hpcdl cancel`: ends runs, saving a checkpoint first where there is something to save."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpcdl.errors import SchedulerError
from hpcdl.runs import failure, private, processes, wish
from hpcdl.runs.judge import NO_LOG
from hpcdl.runs.patience import Patience, of_environment
from hpcdl.runs.reconcile import View, read, reconcile
from hpcdl.runs.scheduler import Slurm
from hpcdl.runs.state import ACTIVE
from hpcdl.runs.store import RunDir

LIMIT_S = 120.0
"""How long running workers are waited for: a large checkpoint on a slow disk takes its time."""
POLL_S = 1.0
KILLED_S = 30.0
"""How long the end of a job is waited for once scancel was sent."""
KEPT = "Slurm does not answer; the wish is kept: workers that train save and stop at their next step"
TOLD_LATER = (
    "The wish to cancel is kept in the run's directory: its workers save and stop, a job that starts ends at once,\n"
    "and the next hpcdl status, follow or cancel tells Slurm when it answers."
)


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

    Where Slurm doesn't answer, the wish is written into the run's directory, and asked again within the limit.

    Args:
        runs: which.
        how: at once, or with a checkpoint, and how long that may take.
        say: takes a line for each thing done.
        slurm: whom to ask.
        poll_s: seconds between looks.

    Returns:
        The runs as they stand afterwards; one that is still active did not end within the limit.

    Raises:
        SchedulerError: Slurm could not be reached; the wish is kept.
    """
    slurm = slurm or Slurm()
    mine = {run: private.is_mine(run.path) for run in runs}
    for run in runs:
        if not mine[run]:
            say(f"{run.path} is {private.owner(run.path)}'s: only they can cancel it")
    runs = [run for run in runs if mine[run]]
    waits = Patience(of_environment(how.limit_s), say=say)
    views = reconcile(read(runs).views, slurm)
    away = [view for view in views if view.state.state == "UNKNOWN"]
    known = [view for view in views if view.state.state != "UNKNOWN"]
    ended = _cancel(known, how, say, slurm, poll_s, waits)
    for view in away:
        wish.make(view.run, now=how.now)
        say(f"{view.state.run_id}: {KEPT}")
    while away:
        if not waits.wait(away[0].unchecked):
            words = f"Slurm could not be reached, so nothing was cancelled there yet: {away[0].unchecked}"
            raise SchedulerError(f"{words}\n{TOLD_LATER}")
        answered = _fresh(away, slurm)
        away = [view for view in answered if view.state.state == "UNKNOWN"]
        known = [view for view in answered if view.state.state != "UNKNOWN"]
        ended += _cancel(known, how, say, slurm, poll_s, waits)
    final = {view.run: view for view in ended}
    return [final.get(view.run, view) for view in views]


def _cancel(
    views: Sequence[View],
    how: How,
    say: Callable[[str], None],
    slurm: Slurm,
    poll_s: float,
    waits: Patience,
) -> list[View]:
    """Ends runs whose state is known."""
    for view in views:
        if view.state.state not in ACTIVE:
            say(f"{view.state.run_id} is over already: {_state(view)}")
    active = [view for view in views if view.state.state in ACTIVE]
    unsent = [view for view in active if _is_unsent(view)]
    for view in unsent:
        wish.make(view.run, now=how.now)
        say(
            f"{view.state.run_id} is being submitted: the wish is kept, and its job is cancelled once it is known"
        )
    sent = [view for view in active if not _is_unsent(view)]
    waiting = [view for view in sent if _in_queue(view)]
    running = [view for view in sent if not _in_queue(view)]
    for view in running:
        _ask_to_stop(view, how, say)
    # Pods that are told to end have their time to save, and may not see the wish.
    _scancel([view for view in running if view.state.kind == "kubernetes"], how, slurm, waits)
    direct = [*waiting, *(view for view in running if how.now)]
    _scancel(direct, how, slurm, waits)
    waiting_now = {view.run for view in waiting}
    ended = _wait(direct, KILLED_S, slurm, poll_s)
    gently = _wait([view for view in running if not how.now], how.limit_s, slurm, poll_s)
    ended += _finish(gently, how, slurm, poll_s, say, waits)
    for view in ended:
        never = view.run in waiting_now and not failure.log_files(view.run, view.state.attempt)
        say(f"{view.state.run_id} {_state(view)}{_never_logs(view) if never else ''}")
    return ended


def _scancel(views: Sequence[View], how: How, slurm: Slurm, waits: Patience) -> None:
    """Tells the scheduler, again and again within the limit; the wish is kept meanwhile, and where it was in vain.

    Raises:
        SchedulerError: Slurm did not answer in time.
    """
    jobs = [view.state.job_id for view in views if view.state.kind == "slurm" and view.state.job_id]
    in_pods = [view for view in views if view.state.kind == "kubernetes" and view.state.state in ACTIVE]
    while jobs or in_pods:
        try:
            if in_pods:
                from hpcdl.runs.kube import look as in_cluster  # few have any

                for view in in_pods:  # for pods that see it, and for whoever looks once the Job is gone
                    wish.make(view.run, now=how.now)
                in_cluster.end(in_pods, now=how.now)
                in_pods = []
            return slurm.cancel(jobs) if jobs else None
        except SchedulerError as error:
            for view in views:
                wish.make(view.run, now=how.now)
            if not waits.wait(str(error)):
                raise SchedulerError(f"{error}\n{TOLD_LATER}") from error


def _is_unsent(view: View) -> bool:
    """Whether no job of its is known yet."""
    return view.state.kind != "local" and not view.state.job_id


def _in_queue(view: View) -> bool:
    return view.state.kind != "local" and view.state.state == "PENDING"


def _ask_to_stop(view: View, how: How, say: Callable[[str], None]) -> None:
    """The STOP file reaches the workers wherever they are; a local agent is told as well."""
    state = view.state
    if how.now:
        if state.kind == "local":
            processes.signal_agent(state, signal.SIGINT)
            time.sleep(0.5)  # two SIGINTs that arrive together count as one
            processes.signal_agent(state, signal.SIGINT)
        return
    wish.make(view.run, now=False)
    if state.kind == "local":
        processes.signal_agent(state, signal.SIGINT)
    say(f"{state.run_id} saves a checkpoint and stops …")


def _wait(views: Sequence[View], limit_s: float, slurm: Slurm, poll_s: float) -> list[View]:
    """The runs, each as it was when it had ended, or when the limit was reached."""
    deadline = time.monotonic() + limit_s
    current = list(views)
    while any(view.state.state in ACTIVE for view in current):
        fresh = iter(_fresh([view for view in current if view.state.state in ACTIVE], slurm))
        current = [next(fresh) if view.state.state in ACTIVE else view for view in current]
        if time.monotonic() > deadline:
            break
        if any(view.state.state in ACTIVE for view in current):
            time.sleep(poll_s)
    return current


def _fresh(views: Sequence[View], slurm: Slurm) -> list[View]:
    again = [dataclasses.replace(view, state=view.run.read_state(), unchecked="") for view in views]
    return reconcile(again, slurm)


def _finish(
    views: Sequence[View],
    how: How,
    slurm: Slurm,
    poll_s: float,
    say: Callable[[str], None],
    waits: Patience,
) -> list[View]:
    """What is left of the jobs is ended: exactly these array tasks, not their siblings."""
    late = [view for view in views if view.state.state in ACTIVE]
    for view in late:
        say(f"{view.state.run_id} has not stopped within {how.limit_s:g} s")
    _scancel([view for view in views if view.state.kind == "slurm"], how, slurm, waits)
    _scancel(
        [view for view in late if view.state.kind == "kubernetes"],
        dataclasses.replace(how, now=True),
        slurm,
        waits,
    )
    away = _wait([view for view in late if view.state.kind != "local"], KILLED_S, slurm, poll_s)
    ended = {view.run: view for view in away}
    return [ended.get(view.run, view) for view in views]


def _state(view: View) -> str:
    return f"{view.state.state}{': ' + view.state.reason if view.state.reason else ''}"


def _never_logs(view: View) -> str:
    return "" if NO_LOG in view.state.reason else f"; {NO_LOG}"
