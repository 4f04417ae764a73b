"""What an agent asks of Slurm: what is happening to its own job, to be queued again, to submit its successor."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpcdl import secrets
from hpcdl.errors import SchedulerError
from hpcdl.launch.lost import NO_ANSWER, LostAnswer
from hpcdl.runs import outside
from hpcdl.runs.patience import Patience
from hpcdl.runs.submissions import SBATCH_LIMIT_S

Fate = Literal["running", "requeued", "preempted", "timeout", "cancelled", "unknown"]
_LIMIT_S = 30.0
_AWAY_S = 600.0
"""How long a requeue is asked for while the controller is away: it ends no job meanwhile either."""
_BETWEEN_S = 5.0
"""The most between two tries: a controller that comes back ends the job 30 s after its time limit."""
_KEPT = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT"})
"""Settings of Slurm's own commands, which are no job's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFate:
    """What Slurm is doing with the job."""

    fate: Fate
    words: str
    """Slurm's own: the state and reason, or why it couldn't be asked."""


def ask(job_id: str, restarts: int) -> JobFate:
    """What is happening to a job whose processes were told to end.

    While processes are left, `JobState` is COMPLETING whatever the cause, so the cause is read from the rest
    (seen on 22.05): a job that goes back to the queue (preempted, requeued by somebody) has a higher
    `Restarts` already; one that was preempted and doesn't (PreemptMode=CANCEL), or has a grace time left, has a
    `PreemptTime`; the time limit is the `Reason`; what remains is scancel.

    Args:
        job_id: `123_4` for an array task.
        restarts: SLURM_RESTART_COUNT of this try.
    """
    return _fate(_show(job_id), restarts)


def _show(job_id: str) -> subprocess.CompletedProcess[str]:
    return run(["scontrol", "show", "job", "-o", job_id])


def _fate(done: subprocess.CompletedProcess[str], restarts: int) -> JobFate:
    if done.returncode != 0:
        return JobFate(fate="unknown", words=said(done))
    fields = dict(re.findall(r"(?:^| )(\w+)=(\S*)", done.stdout))
    state, reason = fields.get("JobState", ""), fields.get("Reason", "")
    words = state if reason in ("", "None") else f"{state} ({reason})"
    count = fields.get("Restarts", "")
    if count.isdigit() and int(count) > restarts:
        return JobFate(fate="requeued", words=words)
    if fields.get("PreemptTime", "None") != "None":
        return JobFate(fate="preempted", words=words)
    if state == "RUNNING":
        return JobFate(fate="running", words=words)
    if state == "TIMEOUT" or reason == "TimeLimit":
        return JobFate(fate="timeout", words=words)
    if state.startswith(("COMPLETING", "CANCELLED")):
        return JobFate(fate="cancelled", words=words)
    return JobFate(fate="unknown", words=words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Back:
    """What became of the wish to be queued again."""

    refused: str = ""
    """Slurm's words if it refuses; empty where the job is in the queue again, or will be."""
    by_slurm: bool = False
    """Slurm had queued the job again by itself; its next try may be running."""


def requeue(job_id: str, restarts: int, waits: Patience | None = None) -> Back:
    """Puts the job back into the queue, unless it is no more the job that this try belongs to.

    A node that was cut off reaches Slurm again after minutes. Slurm has given it up then and started the job
    elsewhere, or somebody has cancelled it: a requeue would end that try, or wake the job up again (seen on 22.05).

    Args:
        job_id: `123_4` for an array task.
        restarts: SLURM_RESTART_COUNT of this try.
        waits: how long to go on while Slurm doesn't answer.
    """
    waits = waits or Patience(_AWAY_S, sleep=lambda delay: time.sleep(min(delay, _BETWEEN_S)))
    while True:
        done = _show(job_id)
        if not _unanswered(done):
            fate = _fate(done, restarts)
            if fate.fate == "requeued":
                return Back(by_slurm=True)
            if fate.fate == "cancelled":
                return Back(refused=f"the job was cancelled: {fate.words}")
            done = run(["scontrol", "requeue", job_id])
            if done.returncode == 0:
                return Back()
        if not _unanswered(done) or not waits.wait(said(done)):
            return Back(refused=said(done))


def waited_for(job_id: str) -> str:
    """A job of this user's that waits for this one's end, as Slurm says it; empty where there is none.

    Raises:
        SchedulerError: Slurm doesn't answer.
    """
    done = run(["squeue", "-h", "-a", "-t", "pending", "-u", str(os.getuid()), "-o", "%i|%E"])
    if done.returncode != 0:
        raise SchedulerError(said(done))
    array, _, task = job_id.partition("_")
    own = re.compile(rf":{array}(?![0-9_])" + (rf"|:{array}_(?:\*|{task}(?![0-9]))" if task else ""))
    for line in done.stdout.splitlines():
        other, _, dependency = line.partition("|")
        if own.search(dependency):
            return other
    return ""


def submit(script: Path) -> str:
    """Runs sbatch once; returns the job's id.

    Raises:
        LostAnswer: whether it got through is not known.
        SchedulerError: it was refused, or there is no sbatch here; with Slurm's own words.
    """
    done = run(["sbatch", "--parsable", str(script)], SBATCH_LIMIT_S, submitting())
    if done.returncode != 0:
        raise LostAnswer(said(done)) if _unanswered(done) else SchedulerError(said(done))
    found = re.match(r"(\d+)(;|$)", done.stdout.strip())
    if found is None:
        raise LostAnswer(f"sbatch said {done.stdout.strip()!r}")
    return found.group(1)


def submitting() -> dict[str, str]:
    """The environment of a job that is submitted from inside this one."""
    given = {
        word.partition(b"=")[0].decode() for word in Path("/proc/self/environ").read_bytes().split(b"\0")
    }
    # What was read from the user's file of secrets since this process began: the next job reads it there.
    unset = {*job_variables(os.environ), *(n for n in os.environ if secrets.is_name(n) and n not in given)}
    return {key: value for key, value in os.environ.items() if key not in unset}


def job_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables by which a job would pass its own settings on to jobs that are submitted from inside it."""
    return sorted(
        name
        for name in environment
        if (name.startswith(("SLURM_", "SLURMD_")) and name not in _KEPT) or name == "HPCDL_LOCAL"
    )


def run(
    command: list[str], limit_s: float = _LIMIT_S, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs one of Slurm's commands; one that is missing gives code 127, one that hangs 124.

    Inside of a container it is run outside, which knows by itself what environment a job is given.
    """
    if outside.is_here():
        return outside.run(command, "", limit_s)
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            env=environment,
            check=False,
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not on this node's PATH")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"{command[0]}: no answer in {limit_s:g} s")


def _unanswered(done: subprocess.CompletedProcess[str]) -> bool:
    return done.returncode == 124 or NO_ANSWER.search(done.stderr) is not None


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that failed said, on one line."""
    return " ".join(done.stderr.split()) or f"{done.args[0]} ended with code {done.returncode}"
