"""How a try of a run ended, and what follows: pure rules over what the agent has seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcdl.launch.control import JobFate
from hpcdl.runs.state import State

INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """outcome.json: how rank 0's loop ended."""

    status: str
    """`finished` or `stopped`."""
    reason: str
    """Why it stopped: `cancel`; `signal USR2`, or `SIGUSR2` where the agent passed it on through the STOP file"""
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the agent knows once torchrun has ended."""

    kind: str
    """`local`, `slurm` or `kubernetes`."""
    code: int
    """torchrun's exit code."""
    outcome: Outcome | None
    """This try's, if rank 0 wrote one."""
    signals: tuple[str, ...] = ()
    """Signals that the agent got, in their order, without `SIG`."""
    killed: bool = False
    """Whether a second SIGINT made it kill the workers."""
    speechless: bool = False
    """Whether the agent was killed, so that only Slurm may know why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The state that follows. With `requeue` another try is wished for; `state` holds if there is none."""

    state: State
    reason: str = ""
    exit_code: int | None = None
    requeue: bool = False
    requeued: bool = False
    """Slurm has queued the job again by itself."""


def read_outcome(path: Path, attempt: str) -> Outcome | None:
    """outcome.json, if it is this try's (an earlier try's file may still lie there)."""
    try:
        plain: Any = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if not isinstance(plain, Mapping) or plain.get("try") != attempt:
        return None
    return Outcome(
        status=str(plain.get("status", "")),
        reason=str(plain.get("reason", "")),
        step=int(plain.get("step", 0)),
    )


def decide(seen: Seen, ask: Callable[[], JobFate], cause: Callable[[], tuple[State, str]]) -> Ending:
    """The rules.

    Args:
        seen: what the agent knows.
        ask: asks Slurm what is happening to the job; called only where it matters.
        cause: finds the root cause of a failure, and its word (FAILED, OUT_OF_MEMORY); called only for one.
    """
    if seen.killed:
        return Ending(state="CANCELLED", reason="killed by a second interrupt", exit_code=INTERRUPTED)
    if seen.code == 0 and seen.outcome is None:
        return Ending(state="FAILED", reason="the workers ended without writing outcome.json", exit_code=1)
    if seen.code == 0 and seen.outcome is not None:
        if seen.outcome.status == "finished":
            return Ending(state="COMPLETED", exit_code=0)
        return _stopped(seen, seen.outcome, ask)
    if seen.outcome is not None and seen.outcome.status == "stopped" and seen.signals:
        # Rank 0's last act, after everybody's checkpoint: a further signal has only killed who was leaving.
        return _stopped(seen, seen.outcome, ask)
    if (seen.signals or seen.speechless) and seen.kind == "slurm":
        how = "while it was told to stop" if seen.signals else "its agent was killed"
        ended = _ended_by_slurm(ask(), f"{how}, before a checkpoint was saved")
        if ended is not None:
            return ended
    if seen.signals and seen.kind == "kubernetes":
        return _told_by_kubelet("before a checkpoint was saved")
    state, reason = cause()
    return Ending(state=state, reason=reason, exit_code=1)


def _stopped(seen: Seen, outcome: Outcome, ask: Callable[[], JobFate]) -> Ending:
    """All ranks agreed to stop and saved a checkpoint."""
    saved = f"checkpoint saved at step {outcome.step}"
    word = (outcome.reason.split() or ["?"])[0]
    if not word.startswith(("signal", "SIG")):
        return Ending(state="CANCELLED", reason=f"{word}; {saved}", exit_code=INTERRUPTED)
    if seen.kind == "kubernetes":
        return _told_by_kubelet(saved)
    first = seen.signals[0] if seen.signals else outcome.reason.split()[-1].removeprefix("SIG")
    if first == "INT" or seen.kind != "slurm":
        return Ending(state="CANCELLED", reason=f"stopped by SIG{first}; {saved}", exit_code=INTERRUPTED)
    fate = ask()
    if fate.fate in ("requeued", "cancelled"):
        ended = _ended_by_slurm(fate, saved)
        assert ended is not None
        return ended
    # USR2 announces the time limit (or a preemption); TERM comes with a grace time, or at the limit itself.
    limit = fate.fate != "preempted" and ("USR2" in seen.signals or fate.fate == "timeout")
    late: State = "TIMEOUT" if limit else "PREEMPTED"
    return Ending(state=late, reason=f"stopped by SIG{first}; {saved}", exit_code=1, requeue=True)


def _told_by_kubelet(how: str) -> Ending:
    """A pod was told to end: preempted, drained, or its Job was deleted, which nobody tells the pod. If it was
    preempted, it is made anew; where the Job is gone, whoever looks from outside says so (hpcdl.runs.kube.judge).
    """
    reason = f"a pod was told to end by Kubernetes; {how}"
    return Ending(state="PREEMPTED", reason=reason, exit_code=1, requeue=True)


def _ended_by_slurm(fate: JobFate, how: str) -> Ending | None:
    if fate.fate == "requeued":
        return Ending(state="PENDING", reason=f"requeued by Slurm; {how}", requeued=True)
    if fate.fate == "timeout":
        return Ending(state="TIMEOUT", reason=f"time limit; {how}", exit_code=1, requeue=True)
    if fate.fate == "preempted":
        return Ending(state="PREEMPTED", reason=f"preempted; {how}", exit_code=1, requeue=True)
    if fate.fate == "cancelled":
        return Ending(state="CANCELLED", reason=f"scancel; {how}", exit_code=INTERRUPTED)
    return None
