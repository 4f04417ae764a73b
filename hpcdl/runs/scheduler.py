"""What Slurm says of jobs: squeue, then scontrol, then sacct, each asked once for all jobs.

Text formats with explicit fields only (`--json` changes between versions). slurmdbd may be missing,
slurmctld may be away, and a job that has ended is forgotten after MinJobAge: an empty answer is not a
failure, and a failed poll is not a state. So an `Answer` tells three things apart: what is known of a job,
that the controller knows of no such job, and that nobody could be asked.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from hpcdl.errors import SchedulerError
from hpcdl.runs.hosts import expand_hosts, task_indices

COMMENT = "hpcdl:"
"""Each job's comment is this and its submission's token: found by it when sbatch's answer was lost."""
ENDED: frozenset[str] = frozenset(
    {
        "COMPLETED",
        "FAILED",
        "CANCELLED",
        "PREEMPTED",
        "TIMEOUT",
        "OUT_OF_MEMORY",
        "NODE_FAIL",
        "BOOT_FAIL",
        "DEADLINE",
        "REVOKED",
    }
)
"""Slurm's words for a job that is over."""
WAITING: frozenset[str] = frozenset(
    {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
)
"""Slurm's words for a job that is in the queue."""
CHUNK = 1000
"""Job ids on one command line."""
_QUEUE_FIELDS = "%F|%K|%T|%S|%N|%r|%k"
_FORGOTTEN = "Invalid job id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job or array task, as Slurm sees it. Times are UTC, ISO 8601."""

    state: str
    """Slurm's long word: PENDING, RUNNING, COMPLETING, TIMEOUT, …"""
    reason: str = ""
    """Why it waits, in Slurm's word (`Priority`, `BeginTime`); empty where Slurm gives none."""
    exit_code: int | None = None
    """As a shell would give it: the code, or 128 + the signal. Null where Slurm doesn't say."""
    start: str | None = None
    """When it started, or is expected to."""
    end: str | None = None
    """When it ended."""
    node_list: tuple[str, ...] = ()
    comment: str = ""
    """The job's comment; sacct doesn't say."""
    source: str = "squeue"
    """The command that said so."""

    @property
    def ended(self) -> bool:
        """Whether the job is over."""
        return self.state in ENDED

    @property
    def waiting(self) -> bool:
        """Whether the job is in the queue."""
        return self.state in WAITING


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one poll gave."""

    jobs: Mapping[str, Job] = field(default_factory=dict)
    """By job id, as it was asked for. An id that is missing here is unknown to everyone who answered."""
    away: str = ""
    """Why the controller could not be asked, in its own words; empty where it answered."""


Runner = Callable[[Sequence[str], str, float], "subprocess.CompletedProcess[str]"]


def _environment() -> dict[str, str]:
    """This environment without what changes the commands' output; times in UTC, array ids not cut short."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SACCT_", "SCONTROL_"))}
    return {**kept, "TZ": "UTC", "LC_ALL": "C", "SLURM_TIME_FORMAT": "standard", "SLURM_BITSTR_LEN": "0"}


def run_command(command: Sequence[str], text: str, limit_s: float) -> subprocess.CompletedProcess[str]:
    """Runs one Slurm command; a missing one, or one that doesn't answer in time, gives rc 127 or 124."""
    try:
        return subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            env=_environment(),
            check=False,
        )
    except FileNotFoundError:
        words = f"{command[0]} is not on this machine: ask from a login node of the cluster"
        return subprocess.CompletedProcess(command, 127, "", words)
    except subprocess.TimeoutExpired:
        words = f"{command[0]} gave no answer within {limit_s:g} s"
        return subprocess.CompletedProcess(command, 124, "", words)


class Slurm:
    """The commands of a login node.

    Args:
        limit_s: seconds that each command may take.
        runner: what runs a command; tests give their own.
    """

    def __init__(self, limit_s: float = 15.0, runner: Runner = run_command) -> None:
        self.limit_s = limit_s
        self._runner = runner

    def ask(self, job_ids: Collection[str]) -> Answer:
        """What is known of each job; at most three commands for every thousand jobs.

        Args:
            job_ids: `123` or `123_4`.
        """
        if not job_ids:
            return Answer()
        known, away = self._squeue(job_ids)
        # squeue has no exit codes; scontrol does, and it is the controller's last word on what squeue omits.
        rest = [i for i in job_ids if i not in known or known[i].ended]
        if rest and not away:
            more, away = self._scontrol(rest)
            known.update(more)
        missing = [i for i in job_ids if i not in known]
        if missing:
            # slurmdbd's «running» for a job that the controller doesn't know is a row that nobody closed.
            known.update({i: job for i, job in self._sacct(missing).items() if job.ended})
        return Answer(jobs=known, away=away)

    def find(self, tokens: Collection[str]) -> tuple[dict[str, str], str]:
        """The job id of each submission that is found by its comment, and why nobody could be asked."""
        if not tokens:
            return {}, ""
        command = ["squeue", "-h", "-a", "-t", "all", "-u", str(os.getuid()), "-o", "%F|%k"]
        done = self._runner(command, "", self.limit_s)
        if done.returncode != 0:
            return {}, _words(done)
        found = {}
        for line in done.stdout.splitlines():
            job_id, _, comment = line.partition("|")
            token = comment.strip().removeprefix(COMMENT)
            if comment.startswith(COMMENT) and token in tokens:
                found[token] = job_id
        return found, ""

    def cancel(self, job_ids: Sequence[str]) -> None:
        """`scancel` of exactly these jobs or array tasks; one that is over or forgotten is none to cancel.

        Raises:
            SchedulerError: the controller could not be reached, or refused.
        """
        for chunk in _chunks(job_ids):
            done = self._runner(["scancel", *chunk], "", self.limit_s)
            words = _words(done)
            if done.returncode != 0 and _FORGOTTEN not in words and "already completing" not in words:
                raise SchedulerError(f"scancel {' '.join(chunk[:5])}: {words}")

    def start_now(self, job_id: str) -> bool:
        """Moves a requeued, pending job's begin time to now; whether Slurm took it.

        Slurm sets it about two minutes ahead. While the job is COMPLETING the call has no effect.
        """
        command = ["scontrol", "update", f"jobid={job_id}", "StartTime=now"]
        return self._runner(command, "", self.limit_s).returncode == 0

    def _squeue(self, job_ids: Collection[str]) -> tuple[dict[str, Job], str]:
        known: dict[str, Job] = {}
        for chunk in _chunks(sorted({_base(i) for i in job_ids})):
            command = ["squeue", "-h", "-a", "-t", "all", "-j", ",".join(chunk), "-o", _QUEUE_FIELDS]
            done = self._runner(command, "", self.limit_s)
            if done.returncode != 0 and _FORGOTTEN not in done.stderr:
                return known, _words(done)
            known.update(_match(job_ids, _queue_lines(done.stdout)))
        return known, ""

    def _scontrol(self, job_ids: Collection[str]) -> tuple[dict[str, Job], str]:
        known: dict[str, Job] = {}
        for chunk in _chunks(sorted({_base(i) for i in job_ids})):
            # scontrol takes one job on its command line, but any number of lines on standard input.
            text = "".join(f"show job {i}\n" for i in chunk)
            done = self._runner(["scontrol", "-o"], text, self.limit_s)
            records = list(_control_lines(done.stdout))
            if done.returncode != 0 and not records and _FORGOTTEN not in done.stderr:
                return known, _words(done)
            known.update(_match(job_ids, records))
        return known, ""

    def _sacct(self, job_ids: Collection[str]) -> dict[str, Job]:
        known: dict[str, Job] = {}
        for chunk in _chunks(sorted({_base(i) for i in job_ids})):
            fields = "JobID,State,ExitCode,Start,End,NodeList"
            done = self._runner(
                ["sacct", "-n", "-P", "-X", "-j", ",".join(chunk), "-o", fields], "", self.limit_s
            )
            if done.returncode != 0:
                return known  # no slurmdbd here, or it is away: not an answer
            known.update(_match(job_ids, _account_lines(done.stdout)))
        return known


Record = tuple[str, list[range], Job]
"""A line of an answer: the id of the array or job, the tasks it is about (none: no array), the job."""


def _queue_lines(text: str) -> Iterator[Record]:
    for line in text.splitlines():
        parts = line.split("|", 6)
        if len(parts) != 7:
            continue
        base, tasks, state, start, nodes, reason, comment = (part.strip() for part in parts)
        job = Job(
            state=state,
            reason="" if reason == "None" else reason,
            start=_time(start),
            node_list=expand_hosts(nodes),
            comment="" if comment == "(null)" else comment,
        )
        yield base, task_indices(tasks), job


def _control_lines(text: str) -> Iterator[Record]:
    for line in text.splitlines():
        if not line.startswith("JobId="):
            continue
        values = _pairs(line)
        reason = values.get("Reason", "None")
        job = Job(
            state=values.get("JobState", "UNKNOWN"),
            reason="" if reason == "None" else reason,
            exit_code=_exit_code(values.get("ExitCode", "")),
            start=_time(values.get("StartTime", "")),
            end=_time(values.get("EndTime", "")),
            node_list=expand_hosts(values.get("NodeList", "")),
            comment=values.get("Comment", ""),
            source="scontrol",
        )
        yield values.get("ArrayJobId", values["JobId"]), task_indices(values.get("ArrayTaskId", "")), job


def _pairs(line: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^| )([A-Za-z:/]+)=(\S*)", line))


def _account_lines(text: str) -> Iterator[Record]:
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) != 6:
            continue
        job_id, state, code, start, end, nodes = parts
        base, _, tasks = job_id.partition("_")
        job = Job(
            state=state.split(" ")[0].rstrip("+"),
            reason=state.partition(" ")[2],
            exit_code=_exit_code(code),
            start=_time(start),
            end=_time(end),
            node_list=expand_hosts(nodes),
            source="sacct",
        )
        yield base, task_indices(tasks), job


def _match(job_ids: Iterable[str], records: Iterable[Record]) -> dict[str, Job]:
    """The records by the ids that were asked for: an array's id and task, never a task's own job id."""
    plain: dict[str, Job] = {}
    tasks: dict[str, list[tuple[list[range], Job]]] = {}
    for base, ranges, job in records:
        if ranges:
            tasks.setdefault(base, []).append((ranges, job))
        else:
            plain[base] = job
    known = {}
    for job_id in job_ids:
        base, _, task = job_id.partition("_")
        if base in tasks and task:
            index = int(task)
            jobs = [job for ranges, job in tasks[base] if any(index in r for r in ranges)]
            # A task may stand in a line of its own and, for a moment, still in its array's range.
            known.update({job_id: jobs[-1]} if jobs else {})
        elif base in plain:
            known[job_id] = plain[base]
    return known


def with_comment(job: Job | None, token: str | None) -> Job | None:
    """The job, unless its comment is another submission's: a cluster that was set up anew counts from 1."""
    if job is None or token is None or not job.comment.startswith(COMMENT):
        return job
    return job if job.comment == COMMENT + token else None


def _exit_code(text: str) -> int | None:
    """Slurm's `code:signal` as a shell gives it."""
    code, _, number = text.partition(":")
    if not code.isdigit():
        return None
    signal = int(number) if number.isdigit() else 0
    return int(code) if int(code) or not signal else 128 + signal


def _time(text: str) -> str | None:
    """A time as Slurm prints it (we asked in UTC) as ISO 8601; null for `Unknown`, `N/A`, `None`."""
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC).isoformat(timespec="milliseconds")
    except ValueError:
        return None


def _base(job_id: str) -> str:
    return job_id.partition("_")[0]


def _chunks(items: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]


def _words(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that failed said, on one line."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return " ".join(lines) or f"{done.args[0]} ended with code {done.returncode} and said nothing"
