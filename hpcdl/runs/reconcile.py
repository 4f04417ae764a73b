"""Makes state.json true: compares each active run with its scheduler, and writes down what has changed.

A judgement rests on the state that was read before the scheduler was asked. It is written only if that state
still stands (`RunDir.update(expect=…)`): the agent may have spoken meanwhile, and knows better.

Where Slurm doesn't answer, a run of its is UNKNOWN since the last time that it did, and nothing is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcdl.errors import SchedulerError, UsageError
from hpcdl.runs import chain, contact, failure, judge, many, private, processes, submissions, wish
from hpcdl.runs.judge import Verdict
from hpcdl.runs.patience import Patience
from hpcdl.runs.scheduler import Job, Slurm, with_comment
from hpcdl.runs.state import ACTIVE, RunState
from hpcdl.runs.store import RUNNER, RunDir, read_submission

UNBORN_GRACE_S = 30.0
"""From a local run's submission to its agent's first word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A run as it stands now."""

    run: RunDir
    state: RunState
    """What holds; `reason` of a pending run is the queue's."""
    job: Job | None = None
    """What Slurm said of it, if it was asked and knew."""
    unchecked: str = ""
    """Why this could not be verified; empty where it was."""
    since: str | None = None
    """Since when the state is unknown; null where it is known."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Runs whose state was read, and those that it couldn't be read of."""

    views: list[View] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def read(runs: Iterable[RunDir], seen: Mapping[RunDir, View] | None = None) -> Reading:
    """Reads states without asking anyone whether they hold.

    A folder without a state is left out, and one that nobody lets this user look into.

    Args:
        runs: which.
        seen: those that have just been read, which aren't read again.
    """
    reading = Reading()
    submissions: dict[str, dict[str, Any]] = {}

    def one(run: RunDir) -> View | str | None:
        if seen is not None and run in seen:
            return seen[run]
        try:
            return View(run=run, state=run.read_state(submissions))
        except FileNotFoundError:
            return None
        except (UsageError, OSError) as error:
            hidden = isinstance(error.__cause__, PermissionError) and not os.access(run.path, os.X_OK)
            return None if hidden else str(error)

    for found in many.each(one, runs):
        if isinstance(found, View):
            reading.views.append(found)
        elif found is not None:
            reading.faults.append(found)
    return reading


def reconcile(
    views: Sequence[View], slurm: Slurm | None = None, patience: Patience | None = None
) -> list[View]:
    """The same runs, in the same order, as they stand now. Only active ones are asked for.

    Args:
        views: as `read` gave them.
        slurm: whom to ask; by default the commands on PATH.
        patience: how long to go on asking a Slurm that doesn't answer; by default it is asked once.
    """
    slurm = slurm or Slurm()
    active = [v for v in views if v.state.state in ACTIVE]
    on_slurm = [v for v in active if v.state.kind == "slurm"]
    checked = {v.run: _check_local(v) for v in active if v.state.kind == "local"}
    if in_pods := [v for v in active if v.state.kind == "kubernetes"]:
        from hpcdl.runs.kube import look as in_cluster  # few have any

        checked.update(in_cluster.check(in_pods, patience))
    unsent = [v for v in on_slurm if not v.state.job_id]
    checked.update({v.run: v for v in _find_submitted(unsent, slurm, patience)})
    with_id = [v for v in on_slurm if v.state.job_id] + [
        v for v in checked.values() if v.state.job_id and v.state.kind == "slurm" and v.state.state in ACTIVE
    ]
    answer = slurm.ask([v.state.job_id for v in with_id if v.state.job_id])
    while answer.away and patience is not None and patience.wait(answer.away):
        answer = slurm.ask([v.state.job_id for v in with_id if v.state.job_id])
    if with_id and not answer.away:
        for runs_dir in {v.run.runs_dir for v in with_id}:
            contact.answered(runs_dir)
    for view in with_id:
        job = with_comment(answer.jobs.get(view.state.job_id or ""), view.state.submission)
        checked[view.run] = _check_slurm(view, job, answer.away, slurm)
    _fulfil([checked[view.run] for view in with_id], slurm)
    return [checked.get(view.run, view) for view in views]


def look(run: RunDir, slurm: Slurm | None = None) -> View:
    """One run as it stands now."""
    return reconcile([View(run=run, state=run.read_state())], slurm)[0]


def apply(view: View, verdict: Verdict | None) -> View:
    """Writes a verdict down; where the state has changed meanwhile, what stands there now is shown."""
    if verdict is None:
        return view
    if not verdict.write:
        return dataclasses.replace(view, state=dataclasses.replace(view.state, **verdict.changes))
    try:
        state = view.run.update(expect=view.state, event=verdict.event, **verdict.changes)
    except UsageError as error:
        # Someone else's run: what we know is shown all the same, only not written down.
        state = dataclasses.replace(view.state, **verdict.changes)
        return dataclasses.replace(view, state=state, unchecked=str(error))
    return dataclasses.replace(view, state=state)


def _check_local(view: View) -> View:
    state = view.state
    life = processes.agent_life(state)
    if life == "alive":
        return view
    if life == "elsewhere":
        return dataclasses.replace(view, unchecked=f"runs on {state.host}; ask there whether it still does")
    if life == "unborn":
        return _check_unborn(view)
    return _apply_fresh(view, judge.agent_gone(view.run, state, rebooted=processes.booted_since(state)))


def _check_unborn(view: View) -> View:
    """A local run that is still to begin: it has its turn while its submission's shell lives."""
    state = view.state
    record = read_submission(view.run.runs_dir, state.submission) if state.submission else {}
    runner = read_submission(view.run.runs_dir, state.submission, RUNNER) if state.submission else {}
    host = runner.get("host") or record.get("host")
    if host not in (None, os.uname().nodename):
        return dataclasses.replace(view, unchecked=f"was launched on {host}; ask there")
    if runner:
        if processes.alive(int(runner["pid"]), runner.get("started")):
            return view
        why = "the shell that starts the runs ended before its turn"
        said = failure.last_words(failure.own_output(view.run, state))
        return _apply_fresh(view, judge.never_started(f"{why}{': ' + said if said else ''}"))
    if (
        submissions.launcher_lives(record)
        or submissions.age_s(record.get("created") or state.created) < UNBORN_GRACE_S
    ):
        return view
    return _apply_fresh(view, judge.never_started("its launcher ended before the run had begun"))


def _apply_fresh(view: View, verdict: Verdict) -> View:
    """Like `_apply`, unless the agent has spoken between our reading and its process's end."""
    fresh = view.run.read_state()
    return apply(view, verdict) if fresh == view.state else dataclasses.replace(view, state=fresh)


def _check_slurm(view: View, job: Job | None, away: str, slurm: Slurm) -> View:
    view = dataclasses.replace(view, job=job)
    if job is None and away:
        return unknown(view, away)
    if job is None or job.ended:
        # Its agent may have been killed after it had submitted the job that goes on.
        with contextlib.suppress(SchedulerError, UsageError):
            handed = chain.follow(view.run, view.state, slurm)
            if handed is not None:
                return dataclasses.replace(view, state=handed, job=None)
    if job is not None:
        return apply(view, judge.by_slurm(view.run, view.state, job))
    return apply(view, judge.forgotten(view.run, view.state))


def unknown(view: View, away: str, who: str = "Slurm", kind: str = "slurm") -> View:
    """Nobody could be asked: the last that is known, and since when.

    Args:
        view: the run.
        away: why.
        who: was asked.
        kind: of its cluster.
    """
    answered = contact.last_answer(view.run.runs_dir, kind) or ""
    since = max(answered, view.state.started or "", view.state.created)
    sign = view.run.last_sign()
    known = f"{view.state.state} when last known"
    if sign is not None and sign > since and view.state.state == "RUNNING":
        known += f", last sign of life {judge.clock(sign)}"
    reason = f"unknown since {judge.clock(since)} ({known}); {who} does not answer: {away}"
    state = dataclasses.replace(view.state, state="UNKNOWN", reason=reason)
    return dataclasses.replace(view, state=state, unchecked=away, since=since)


def _fulfil(views: Sequence[View], slurm: Slurm) -> None:
    """A cancel that Slurm could not be told of is told now.

    Of jobs in the queue, and of those that shall end at once; the others' workers see the wish by themselves. Only
    for one's own runs: in another user's, somebody may have written down a job of ours.
    """
    wished = {v.run: wish.of(v.run) for v in views if v.job and not v.job.ended and v.state.state in ACTIVE}
    due = [v for v in views if wished.get(v.run) == "now" or (wished.get(v.run) and v.job and v.job.waiting)]
    due = [v for v in due if private.is_mine(v.run.path)]
    if due:
        with contextlib.suppress(SchedulerError):  # the next look tries again
            slurm.cancel([v.state.job_id for v in due if v.state.job_id])


def _find_submitted(views: Sequence[View], slurm: Slurm, patience: Patience | None) -> list[View]:
    """Runs whose launcher has not had sbatch's answer: is there a job all the same?"""
    members: dict[tuple[Path, str], list[RunDir]] = {}
    for view in views:
        if view.state.submission:
            members.setdefault((view.run.runs_dir, view.state.submission), []).append(view.run)
    jobs = {key: submissions.job_of(*key, runs) for key, runs in members.items()}
    lost = {token for (_, token), job_id in jobs.items() if job_id is None}
    found, away = slurm.find(lost)
    while away and patience is not None and patience.wait(away):
        found, away = slurm.find(lost)
    for (runs_dir, token), job_id in jobs.items():
        if job_id is None and token in found:
            with contextlib.suppress(SchedulerError):  # their agents see that they are not meant
                submissions.settle(runs_dir, token, found[token], slurm, lambda _: None)
    return [_check_submitted(view, away) for view in views]


def _check_submitted(view: View, away: str) -> View:
    state, runs_dir = view.run.read_state(), view.run.runs_dir
    if state.job_id is not None or state.state not in ACTIVE:  # found, or the launcher has had it meanwhile
        return dataclasses.replace(view, state=state)
    if submissions.may_still_come(runs_dir, state.submission, state.created):
        return dataclasses.replace(view, state=dataclasses.replace(state, reason="is being submitted"))
    if away:
        return unknown(view, away)
    return apply(view, judge.never_started("its launcher ended before sbatch had answered"))
