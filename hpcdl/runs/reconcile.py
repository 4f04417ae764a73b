"""Makes state.json true: compares each active run with its scheduler, and writes down what has changed.

A judgement rests on the state that was read before the scheduler was asked. It is written only if that state
still stands (`RunDir.update(expect=…)`): the agent may have spoken meanwhile, and knows better.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from hpcdl.errors import UsageError
from hpcdl.runs import failure, judge, processes
from hpcdl.runs.files import write_json
from hpcdl.runs.judge import Verdict
from hpcdl.runs.scheduler import Job, Slurm, with_comment
from hpcdl.runs.state import ACTIVE, RunState
from hpcdl.runs.store import RUNNER, SUBMISSIONS, RunDir, read_submission

SBATCH_GRACE_S = 30.0
"""A launcher that dies may leave its sbatch behind, which can still succeed for this long."""
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


@dataclass(frozen=True, slots=True)
class Reading:
    """Runs whose state was read, and those that it couldn't be read of."""

    views: list[View] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def read(runs: Iterable[RunDir]) -> Reading:
    """Reads states without asking anyone whether they hold."""
    reading = Reading()
    submissions: dict[str, dict[str, Any]] = {}
    for run in runs:
        try:
            reading.views.append(View(run=run, state=run.read_state(submissions)))
        except FileNotFoundError:
            continue
        except (UsageError, OSError) as error:
            reading.faults.append(str(error))
    return reading


def reconcile(views: Sequence[View], slurm: Slurm | None = None) -> list[View]:
    """The same runs, in the same order, as they stand now. Only active ones are asked for.

    Args:
        views: as `read` gave them.
        slurm: whom to ask; by default the commands on PATH.
    """
    slurm = slurm or Slurm()
    active = [v for v in views if v.state.state in ACTIVE]
    on_slurm = [v for v in active if v.state.kind == "slurm"]
    checked = {v.run: _check_local(v) for v in active if v.state.kind == "local"}
    checked.update({v.run: v for v in _find_submitted([v for v in on_slurm if not v.state.job_id], slurm)})
    with_id = [v for v in on_slurm if v.state.job_id] + [
        v for v in checked.values() if v.state.job_id and v.state.kind == "slurm" and v.state.state in ACTIVE
    ]
    answer = slurm.ask([v.state.job_id for v in with_id if v.state.job_id])
    for view in with_id:
        job = with_comment(answer.jobs.get(view.state.job_id or ""), view.state.submission)
        checked[view.run] = _check_slurm(view, job, answer.away)
    return [checked.get(view.run, view) for view in views]


def look(run: RunDir, slurm: Slurm | None = None) -> View:
    """One run as it stands now."""
    return reconcile([View(run=run, state=run.read_state())], slurm)[0]


def _apply(view: View, verdict: Verdict | None) -> View:
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
    if _launcher_lives(record) or _age_s(record.get("created") or state.created) < UNBORN_GRACE_S:
        return view
    return _apply_fresh(view, judge.never_started("its launcher ended before the run had begun"))


def _apply_fresh(view: View, verdict: Verdict) -> View:
    """Like `_apply`, unless the agent has spoken between our reading and its process's end."""
    fresh = view.run.read_state()
    return _apply(view, verdict) if fresh == view.state else dataclasses.replace(view, state=fresh)


def _check_slurm(view: View, job: Job | None, away: str) -> View:
    view = dataclasses.replace(view, job=job)
    if job is not None:
        return _apply(view, judge.by_slurm(view.run, view.state, job))
    if away:
        reason = f"{view.state.state} when last known; Slurm does not answer: {away}"
        unknown = dataclasses.replace(view.state, state="UNKNOWN", reason=reason)
        return dataclasses.replace(view, state=unknown, unchecked=away)
    return _apply(view, judge.forgotten(view.run, view.state))


def _find_submitted(views: Sequence[View], slurm: Slurm) -> list[View]:
    """Runs whose launcher has not had sbatch's answer: are they in the queue all the same?"""
    tokens = {v.state.submission for v in views if v.state.submission}
    found, away = slurm.find(tokens)
    for token, job_id in found.items():
        runs_dir = next(v.run.runs_dir for v in views if v.state.submission == token)
        record = read_submission(runs_dir, token)
        if record and not record.get("job_id"):
            write_json(runs_dir / SUBMISSIONS / token / "submission.json", {**record, "job_id": job_id})
    return [_check_submitted(view, found, away) for view in views]


def _check_submitted(view: View, found: dict[str, str], away: str) -> View:
    state = view.state
    token = state.submission
    if token in found:
        task = "" if state.array_index is None else f"_{state.array_index}"
        return dataclasses.replace(view, state=view.run.update(expect=state, job_id=f"{found[token]}{task}"))
    record = read_submission(view.run.runs_dir, token) if token else {}
    if record.get("job_id"):  # the launcher has had it meanwhile
        return dataclasses.replace(view, state=view.run.read_state())
    host = record.get("host")
    elsewhere = host not in (None, os.uname().nodename)
    if (
        _launcher_lives(record)
        or _age_s(record.get("created") or state.created) < SBATCH_GRACE_S
        or elsewhere
    ):
        return dataclasses.replace(view, state=dataclasses.replace(state, reason="is being submitted"))
    if away:
        unknown = dataclasses.replace(state, state="UNKNOWN", reason=f"Slurm does not answer: {away}")
        return dataclasses.replace(view, state=unknown, unchecked=away)
    return _apply(view, judge.never_started("its launcher ended before sbatch had answered"))


def _launcher_lives(record: dict[str, Any]) -> bool:
    pid, started = record.get("pid"), record.get("pid_started")
    return (
        isinstance(pid, int) and record.get("host") == os.uname().nodename and processes.alive(pid, started)
    )


def _age_s(created: str) -> float:
    """Seconds since a time; a long time where there is none."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(created)) / timedelta(seconds=1)
    except ValueError:
        return float("inf")
