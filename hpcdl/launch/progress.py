"""What follows a failure: another try in place, another start of the job, or the end. Pure rules.

A try makes progress if it comes to a later step than any try before it, or saves a later checkpoint. What is
counted against `cluster.max_restarts` and `cluster.max_requeues` are tries without progress in a row, so that a
run of a hundred time limits goes on as long as it gets ahead, and a run that dies at the same step does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from hpcdl.launch.causes import Cause
from hpcdl.runs import kinds
from hpcdl.runs.kinds import NEVER_RESTART, Kind
from hpcdl.runs.store import RunDir

SAME_STEP = 3
"""Tries in a row that may end at the same step by the same kind of failure; the last of them ends the run."""
BEFORE_A_STEP = 2
"""So many more where none of them got beyond what was saved: who is killed while he starts may have met the same
misfortune twice."""

Then = Literal["restart", "requeue", "stop"]

RESTARTING = "restarting"
"""The event of a restart in place; that of a requeue is `requeued`. Both carry `details()`."""
BY_TORCHRUN = "torchrun"
BY_THE_JOB = "job"
"""Who restarts in place (`in_place` of the event): torchrun its workers, or the job a new try of its own."""

LOST = "lost"
"""The event by which a try tells that the one before it left no last word (hpcdl.launch.before)."""

_NEVER: frozenset[Kind] = frozenset({"fault", "memory"})
_ELSEWHERE: frozenset[Kind] = frozenset({"node", "device"})
"""What a restart on the same nodes doesn't help."""
_ASKED: frozenset[Kind] = frozenset({"preempted", "timeout"})
_SAME_STEP: frozenset[Kind] = frozenset({"hang", "killed", "timeout", "unknown"})
"""What says something of the run if it happens at the same step again; the others are their surroundings'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How one try ended."""

    kind: Kind
    step: int
    """The last step that it came to."""
    saved: int
    """Step of the newest whole checkpoint at its end; 0 without one."""
    reason: str = ""
    """In words, as in state.json."""
    node: str = ""
    """The node to blame; empty where it is none, or not known."""
    exit_code: int = 1
    """The run's own: the failed rank's, 128 + n where signal n has ended it."""
    then: Then = "stop"
    """What followed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is allowed."""

    max_restarts: int
    """Restarts in place without progress in a row, on the same start of the job."""
    max_requeues: int
    """Starts of the job without progress in a row."""
    can_exclude: bool = True
    """Whether the job may be kept off a node that is not fit."""
    spare: bool = False
    """Whether the job has nodes enough without that one (cluster.min_nodes)."""
    same_step: int = SAME_STEP


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What to do now."""

    then: Then
    why: str
    """In words: for the event, and after the failure's reason in state.json."""
    exclude: tuple[str, ...] = ()
    """Nodes that the job must be kept off."""
    exit_code: int = 0
    """The agent's, where it ends the run: NEVER_RESTART if the same would happen again, else the worker's own."""


def verdict(history: Sequence[Failure], failure: Failure, limits: Limits) -> Verdict:
    """The policy.

    Args:
        history: this launch's earlier tries that did not end well, oldest first (see `history`).
        failure: how this try has ended.
        limits: what the config allows.
    """
    if failure.kind in _NEVER:
        again = (
            "the same would happen again"
            if failure.kind == "fault"
            else "it would run out again at the same size"
        )
        return _stop(f"not tried again: {again}", NEVER_RESTART)
    streak = _without_progress(history, failure)
    same = 1 + _at_the_same_step(streak, failure)
    patience = BEFORE_A_STEP if failure.step == failure.saved and failure.kind != "timeout" else 0
    if failure.kind in _SAME_STEP and same >= limits.same_step + patience:
        what = (
            "ended by the time limit"
            if failure.kind == "timeout"
            else f"ended by {kinds.WORDS[failure.kind]}"
        )
        hint = ": cluster.time_min is too short for a step" if failure.kind == "timeout" else ""
        return _stop(
            f"{same} tries in a row {what} at step {failure.step}, without progress{hint}", NEVER_RESTART
        )
    exclude = (failure.node,) if failure.kind in _ELSEWHERE and failure.node else ()
    if exclude and not limits.can_exclude:
        return _stop(f"node {failure.node} is not fit, and the job can't be kept off it", failure.exit_code)
    if limits.spare or failure.kind not in _ELSEWHERE | _ASKED:
        restarts = _restarts(streak)
        if restarts < limits.max_restarts:
            return Verdict(then="restart", why=f"restart in place {restarts + 1} of {limits.max_restarts}")
    requeues = sum(one.then == "requeue" for one in streak)
    if requeues < limits.max_requeues:
        off = f", off node {failure.node}" if exclude else ""
        count = (
            f" {requeues + 1} of {limits.max_requeues} without progress"
            if streak or limits.max_restarts
            else ""
        )
        return Verdict(then="requeue", why=f"requeue{count}{off}", exclude=exclude)
    return _stop(_used_up(limits), failure.exit_code or 1)


def _stop(why: str, code: int) -> Verdict:
    return Verdict(then="stop", why=why, exit_code=code)


def _used_up(limits: Limits) -> str:
    if not limits.max_requeues:
        return (
            "no restart is left (cluster.max_restarts)"
            if limits.max_restarts
            else "not tried again (cluster.max_restarts, cluster.max_requeues)"
        )
    return f"no requeue is left (cluster.max_requeues={limits.max_requeues} without progress)"


def _without_progress(history: Sequence[Failure], failure: Failure) -> list[Failure]:
    """The tries before this one since which nothing was gained."""
    step = saved = -1
    streak: list[Failure] = []
    for one in (*history, failure):
        if one.step > step or one.saved > saved:
            streak = []
        streak.append(one)
        step, saved = max(step, one.step), max(saved, one.saved)
    return streak[:-1]


def _at_the_same_step(streak: Sequence[Failure], failure: Failure) -> int:
    """How many of the last tries ended as this one did, without another in between."""
    count = 0
    for one in reversed(streak):
        if (one.step, one.kind) != (failure.step, failure.kind):
            break
        count += 1
    return count


def _restarts(streak: Sequence[Failure]) -> int:
    """Restarts in place since the job's last start."""
    count = 0
    for one in reversed(streak):
        if one.then == "requeue":
            break
        count += one.then == "restart"
    return count


def details(failure: Failure, decided: Verdict) -> dict[str, Any]:
    """What the event of a try's end (`restarting`, `requeued`) tells, for people and for `history`."""
    plain = {key: value for key, value in asdict(failure).items() if key not in ("exit_code", "then")}
    more = {"exclude": list(decided.exclude)} if decided.exclude else {}
    return {**plain, "then": decided.then, "why": decided.why, **more}


def history(events: Iterable[Mapping[str, Any]], attempt: int) -> list[Failure]:
    """This launch's tries that did not end well, oldest first, from events.jsonl.

    Args:
        events: all of the run's.
        attempt: RunState.attempt: an earlier launch's failures don't count.
    """
    found: list[Failure] = []
    for event in events:
        kind = event.get("event")
        other = kind == "started" and str(event.get("try", "")).partition(".")[0] != str(attempt)
        if other or kind == "submitted":
            found = []
        elif kind == LOST:
            found.append(lost(_int(event.get("saved"))))
        elif kind in (RESTARTING, "requeued") and event.get("kind") in get_args(Kind):
            found.append(_read(event, "restart" if kind == RESTARTING else "requeue"))
    return found


def lost(saved_step: int) -> Failure:
    """A try that left no last word, and that Slurm has started anew by itself.

    Args:
        saved_step: step of the newest whole checkpoint when the next one began.
    """
    return Failure(kind="node", step=saved_step, saved=saved_step, then="requeue")


def _read(event: Mapping[str, Any], then: Then) -> Failure:
    return Failure(
        kind=event["kind"],
        step=_int(event.get("step")),
        saved=_int(event.get("saved")),
        reason=str(event.get("reason", "")),
        node=str(event.get("node", "")),
        then=then,
    )


def _int(value: Any) -> int:
    return value if isinstance(value, int) else 0


def saved(run: RunDir) -> int:
    """Step of the newest whole checkpoint; 0 without one."""
    from hpcdl.spec.checkpoint import newest  # with the spec: 40 ms

    found, _ = newest(run.checkpoints)
    return found.step if found else 0


def of_cause(cause: Cause, saved_step: int, step: int | None = None) -> Failure:
    """A cause as the policy takes it.

    Args:
        cause: the root cause (`causes.find`).
        saved_step: step of the newest whole checkpoint (`saved`).
        step: the last step that any rank came to, where the agent knows it better than the failed rank.
    """
    reached = max(saved_step, cause.step or 0, step or 0)
    kind = cause.kind
    return Failure(
        kind=kind,
        step=reached,
        saved=saved_step,
        reason=cause.reason,
        node=cause.node if kind in _ELSEWHERE else "",
        exit_code=cause.exit_code,
    )
