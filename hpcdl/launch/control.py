"""The two things that an agent asks of Slurm: what is happening to its own job, and to be queued again."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import Literal

Fate = Literal["running", "requeued", "timeout", "cancelled", "unknown"]
_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFate:
    """What Slurm is doing with the job."""

    fate: Fate
    words: str
    """Slurm's own: the state and reason, or why it couldn't be asked."""


def ask(job_id: str, requeue: int) -> JobFate:
    """What is happening to a job whose processes were told to end.

    While processes are left, `JobState` is COMPLETING whatever the cause, so the cause is read from the rest
    (seen on 22.05): a job that goes back to the queue (preempted, requeued by somebody) has a higher
    `Restarts` already; the time limit is the `Reason`; what remains is scancel.

    Args:
        job_id: `123_4` for an array task.
        requeue: SLURM_RESTART_COUNT of this try.
    """
    done = run(["scontrol", "show", "job", "-o", job_id])
    if done.returncode != 0:
        return JobFate(fate="unknown", words=said(done))
    fields = dict(re.findall(r"(?:^| )(\w+)=(\S*)", done.stdout))
    state, reason = fields.get("JobState", ""), fields.get("Reason", "")
    words = state if reason in ("", "None") else f"{state} ({reason})"
    restarts = fields.get("Restarts", "")
    if restarts.isdigit() and int(restarts) > requeue:
        return JobFate(fate="requeued", words=words)
    if state == "RUNNING":
        return JobFate(fate="running", words=words)
    if state == "TIMEOUT" or reason == "TimeLimit":
        return JobFate(fate="timeout", words=words)
    if state.startswith(("COMPLETING", "CANCELLED")):
        return JobFate(fate="cancelled", words=words)
    return JobFate(fate="unknown", words=words)


def requeue(job_id: str) -> str:
    """Puts the job back into the queue; returns Slurm's words if it refuses, else an empty string."""
    done = run(["scontrol", "requeue", job_id])
    return "" if done.returncode == 0 else said(done)


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """One of Slurm's commands; a missing one gives code 127, one that doesn't answer in time 124."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_LIMIT_S, check=False
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not on this node's PATH")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"{command[0]}: no answer in {_LIMIT_S:g} s")


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that failed said, on one line."""
    return " ".join(done.stderr.split()) or f"{done.args[0]} ended with code {done.returncode}"
