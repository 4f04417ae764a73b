"""What squeue, scontrol and sacct print, as jobs. A line that is cut short or means nothing is left out.

Whoever asked finds out from what is missing that the answer was not whole (hpcdl.runs.scheduler).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import get_args

from hpcdl.runs.hosts import expand_hosts, task_indices
from hpcdl.runs.state import ACTIVE, State

ENDED = (frozenset(get_args(State)) - ACTIVE) | {"BOOT_FAIL", "DEADLINE", "REVOKED"}
"""Slurm's words for a job that is over."""
WAITING: frozenset[str] = frozenset(
    {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
)
"""Slurm's words for a job that is in the queue."""
QUEUE_FIELDS = "%F|%K|%T|%S|%N|%r|%k"
"""What squeue is asked for (-o)."""
ACCOUNT_FIELDS = "JobID,State,ExitCode,Start,End,NodeList"
"""What sacct is asked for (-o)."""
_STATE = re.compile(r"[A-Z][A-Z_]+")


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


Record = tuple[str, list[range], Job]
"""A line of an answer: the id of the array or job, the tasks it is about (none: no array), the job."""


def whole_lines(text: str) -> list[str]:
    """The lines of an answer, less a last one without its end: the command was killed while it wrote."""
    return text.split("\n")[:-1]


def queue_lines(text: str) -> Iterator[Record]:
    """The jobs of `squeue -h -o QUEUE_FIELDS`."""
    for line in whole_lines(text):
        parts = line.split("|", 6)
        if len(parts) != 7:
            continue
        base, tasks, state, start, nodes, reason, comment = (part.strip() for part in parts)
        if not base.isdigit() or not _STATE.fullmatch(state):
            continue
        job = Job(
            state=state,
            reason="" if reason == "None" else reason,
            start=_time(start),
            node_list=_hosts(nodes),
            comment="" if comment == "(null)" else comment,
        )
        yield base, task_indices(tasks), job


def control_lines(text: str) -> Iterator[Record]:
    """The jobs of `scontrol -o show job`."""
    for line in whole_lines(text):
        if not line.startswith("JobId="):
            continue
        values = _pairs(line)
        base = values.get("ArrayJobId", values["JobId"])
        if not base.isdigit() or not _STATE.fullmatch(values.get("JobState", "")):
            continue
        reason = values.get("Reason", "None")
        job = Job(
            state=values["JobState"],
            reason="" if reason == "None" else reason,
            exit_code=_exit_code(values.get("ExitCode", "")),
            start=_time(values.get("StartTime", "")),
            end=_time(values.get("EndTime", "")),
            node_list=_hosts(values.get("NodeList", "")),
            comment=values.get("Comment", ""),
            source="scontrol",
        )
        yield base, task_indices(values.get("ArrayTaskId", "")), job


def account_lines(text: str) -> Iterator[Record]:
    """The jobs of `sacct -n -P -X -o ACCOUNT_FIELDS`."""
    for line in whole_lines(text):
        parts = line.split("|")
        if len(parts) != 6:
            continue
        job_id, state, code, start, end, nodes = parts
        base, _, tasks = job_id.partition("_")
        word = state.split(" ")[0].rstrip("+")
        if not base.isdigit() or not _STATE.fullmatch(word):
            continue
        job = Job(
            state=word,
            reason=state.partition(" ")[2],
            exit_code=_exit_code(code),
            start=_time(start),
            end=_time(end),
            node_list=_hosts(nodes),
            source="sacct",
        )
        yield base, task_indices(tasks), job


def match(job_ids: Iterable[str], records: Iterable[Record]) -> dict[str, Job]:
    """The records by the ids that were asked for: an array's id and task, never a task's own job id."""
    plain: dict[str, Job] = {}
    tasks: dict[str, list[tuple[list[range], Job]]] = {}
    for base, ranges, job in records:
        if ranges:
            tasks.setdefault(base, []).append((ranges, job))
        else:
            plain[base] = job
    asked: dict[str, dict[int, str]] = {}
    known = {}
    for job_id in job_ids:
        base, _, task = job_id.partition("_")
        if base in tasks and task:
            asked.setdefault(base, {})[int(task)] = job_id
        elif base in plain:
            known[job_id] = plain[base]
    for base, ids in asked.items():
        # A task may stand in a line of its own and, for a moment, still in its array's range: the last line holds.
        for ranges, job in tasks[base]:
            for each in ranges:
                # Lines of one task are many, ranges are few.
                for index in each if len(each) == 1 else [index for index in ids if index in each]:
                    if index in ids:
                        known[ids[index]] = job
    return known


def _pairs(line: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^| )([A-Za-z:/]+)=(\S*)", line))


def _hosts(text: str) -> tuple[str, ...]:
    """The hosts of a list; none where it makes no sense."""
    try:
        return expand_hosts(text)
    except ValueError:
        return ()


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
