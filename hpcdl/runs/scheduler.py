"""What Slurm says of jobs: squeue, then scontrol, then sacct, each asked once for all jobs.

Text formats with explicit fields only (`--json` changes between versions). slurmdbd may be missing,
slurmctld may be away, and a job that has ended is forgotten after MinJobAge: an empty answer is not a
failure, and a failed poll is not a state. So an `Answer` tells three things apart: what is known of a job,
that the controller knows of no such job, and that nobody could be asked. The second is believed only where
the controller denies the job in so many words: an answer may be cut short, or be garbage.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hpcdl.errors import SchedulerError
from hpcdl.runs import outside
from hpcdl.runs.patience import MISSING
from hpcdl.runs.slurm_text import (
    ACCOUNT_FIELDS,
    QUEUE_FIELDS,
    Job,
    account_lines,
    control_lines,
    match,
    queue_lines,
    whole_lines,
)

__all__ = ["Answer", "Job", "Slurm", "run_command", "with_comment"]

COMMENT = "hpcdl:"
"""Each job's comment is this and its submission's token: found by it when sbatch's answer was lost."""
QUEUED_AGAIN = ("NODE_FAIL", "PREEMPTED", "BOOT_FAIL")
"""Ends after which Slurm queues a job again by itself. slurmdbd has them up to half a minute before the job is PENDING
(seen on 22.05: a cut-off node keeps the controller from answering just then)."""
CHUNK = 1000
"""Job ids on one command line."""
SAID_LINES = 3
"""Of what a command says when it fails, the last lines tell why."""
_QUEUED = re.compile(r"\d+\|")
_FORGOTTEN = "Invalid job id"
_DENIED = (_FORGOTTEN, " not found")
"""scontrol's words for a job that it doesn't know. `Job 4_7 not found`, for a task that its array has no more, goes to
standard output up to 24.11 and to standard error in 26.05 (seen)."""


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
    if outside.is_here():
        return outside.run(command, text, limit_s)
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
        words = f"{command[0]} {MISSING}: ask from a login node of the cluster"
        return subprocess.CompletedProcess(command, 127, "", words)
    except OSError as error:
        return subprocess.CompletedProcess(command, 126, "", f"{command[0]}: {error.strerror}")
    except subprocess.TimeoutExpired:
        words = f"{command[0]} gave no answer within {limit_s:g} s"
        return subprocess.CompletedProcess(command, 124, "", words)


class Slurm:
    """The commands of a login node.

    Args:
        limit_s: seconds that each command may take.
        runner: what runs a command; tests give their own.
    """

    def __init__(self, limit_s: float = 20.0, runner: Runner = run_command) -> None:
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
            # slurmdbd's «running» for a job that the controller doesn't know is a row that nobody closed. And while
            # the controller can't be asked, NODE_FAIL is only what became of a try: the job may be queued again.
            known.update(
                {
                    i: job
                    for i, job in self._sacct(missing).items()
                    if job.ended and not (away and job.state in QUEUED_AGAIN)
                }
            )
        return Answer(jobs=known, away=away)

    def find(self, tokens: Collection[str]) -> tuple[dict[str, tuple[str, ...]], str]:
        """The job ids of each submission that is found by its comment, and why nobody could be asked.

        Several ids: sbatch was run anew when its first answer was late.
        """
        if not tokens:
            return {}, ""
        command = ["squeue", "-h", "-a", "-t", "all", "-u", str(os.getuid()), "-o", "%F|%k"]
        done = self._runner(command, "", self.limit_s)
        if done.returncode != 0:
            return {}, _words(done)
        found: dict[str, dict[str, None]] = {}
        lines = [line for line in whole_lines(done.stdout) if line]
        if (done.stdout and not done.stdout.endswith("\n")) or not all(map(_QUEUED.match, lines)):
            return {}, "squeue's answer was not whole"  # «not there» would be believed
        for line in lines:
            job_id, _, comment = line.partition("|")
            token = comment.strip().removeprefix(COMMENT)
            if comment.startswith(COMMENT) and token in tokens:
                found.setdefault(token, {})[job_id] = None
        return {token: tuple(sorted(ids, key=int)) for token, ids in found.items()}, ""

    def cancel(self, job_ids: Sequence[str]) -> None:
        """`scancel` of exactly these jobs or array tasks; one that is over or forgotten is none to cancel.

        Raises:
            SchedulerError: the controller could not be reached, or refused.
        """
        for chunk in _chunks(job_ids):
            done = self._runner(["scancel", *chunk], "", self.limit_s)
            if done.returncode != 0 and (words := _words(done, less=(_FORGOTTEN, "already completing"))):
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
            command = ["squeue", "-h", "-a", "-t", "all", "-j", ",".join(chunk), "-o", QUEUE_FIELDS]
            done = self._runner(command, "", self.limit_s)
            if done.returncode != 0 and _FORGOTTEN not in done.stderr:
                return known, _words(done)
            known.update(match(job_ids, queue_lines(done.stdout)))
        return known, ""

    def _scontrol(self, job_ids: Collection[str]) -> tuple[dict[str, Job], str]:
        """Whole arrays and jobs; then each task that the answer for its array didn't show."""
        known, shown, away = self._show(job_ids, sorted({_base(i) for i in job_ids}))
        # Of arrays that aren't shown at all, every task has been denied.
        hidden = [i for i in job_ids if i not in known and "_" in i and _base(i) in shown]
        if hidden and not away:
            more, _, away = self._show(hidden, hidden)
            known.update(more)
        return known, away

    def _show(self, job_ids: Collection[str], asked: Sequence[str]) -> tuple[dict[str, Job], set[str], str]:
        """What is known of the jobs, the arrays and jobs that were shown, and why the answer is none."""
        known: dict[str, Job] = {}
        shown: set[str] = set()
        for chunk in _chunks(asked):
            # scontrol takes one job on its command line, but any number of lines on standard input.
            text = "".join(f"show job {i}\n" for i in chunk)
            done = self._runner(["scontrol", "-o"], text, self.limit_s)
            records = list(control_lines(done.stdout))
            known.update(match(job_ids, records))
            shown |= {base for base, _, _ in records}
            lacking = [i for i in chunk if (i not in known if "_" in i else i not in shown)]
            said = done.stdout + done.stderr
            if sum(said.count(words) for words in _DENIED) < len(lacking):
                return known, shown, _other_words(done)
        return known, shown, ""

    def _sacct(self, job_ids: Collection[str]) -> dict[str, Job]:
        known: dict[str, Job] = {}
        for chunk in _chunks(sorted({_base(i) for i in job_ids})):
            command = ["sacct", "-n", "-P", "-X", "-j", ",".join(chunk), "-o", ACCOUNT_FIELDS]
            done = self._runner(command, "", self.limit_s)
            if done.returncode != 0:
                return known  # no slurmdbd here, or it is away: not an answer
            known.update(match(job_ids, account_lines(done.stdout)))
        return known


def with_comment(job: Job | None, token: str | None) -> Job | None:
    """The job, unless its comment is another submission's: a cluster that was set up anew counts from 1."""
    if job is None or token is None or not job.comment.startswith(COMMENT):
        return job
    # Not equal but the beginning of ours: cut short on the way.
    return job if (COMMENT + token).startswith(job.comment) else None


def _base(job_id: str) -> str:
    return job_id.partition("_")[0]


def _chunks(items: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]


def _words(done: subprocess.CompletedProcess[str], less: Sequence[str] = ()) -> str:
    """What a command that failed said, on one line; of lines that have any of `less`, nothing."""
    said = one_line(line for line in done.stderr.splitlines() if not any(word in line for word in less))
    if said or done.stderr.strip():
        return said
    return f"{done.args[0]} ended with code {done.returncode} and said nothing"


def one_line(lines: Iterable[str]) -> str:
    """The last few of what a command has said, without the ten tries that it says before."""
    kept = [line.strip() for line in lines if line.strip() and "attempt number" not in line]
    return " ".join(kept[-SAID_LINES:])


def _other_words(done: subprocess.CompletedProcess[str]) -> str:
    """Why an answer is none, though parts of it can be read."""
    if done.returncode != 0 and (words := _words(done, less=_DENIED)):
        return words
    return f"{done.args[0]}'s answer was not whole"
