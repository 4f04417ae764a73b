"""sbatch whose answer was lost: the job is found again by its token, and never submitted a second time.

A controller that is stopped, restarted or cut off may have taken a job and not said so. So after anything but an
id or a refusal, Slurm is asked for the token in the job's comment, as long as it takes within the patience; only
when it has answered twice, some seconds apart, that there is no such job, sbatch is run again. What even that
can't exclude (a request that lay in the controller's socket for longer) is caught at the other end: a
submission's job is decided once (hpcdl.runs.store.decide_job), and a second job's agents end at once.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from hpcdl.errors import SchedulerError
from hpcdl.runs import patience, submissions
from hpcdl.runs.scheduler import Slurm, one_line
from hpcdl.runs.store import RunDir

SETTLE_S = 2.0
"""Between two looks for a job of which Slurm knows nothing."""
NO_ANSWER = re.compile(
    r"unable to contact|timed out|connection (refused|reset|failure|closed)|communication|zero bytes"
    r"|unable to establish|no route to host|network is unreachable|temporarily unable|standby mode"
    r"|broken pipe|transport endpoint|insane message|unexpected message|incomplete|not responding"
    r"|unable to resolve|getaddrinfo|temporarily unavailable|job queue full, sleeping|could not make sense of",
    re.IGNORECASE,
)
"""What sbatch says when it has not heard from the controller, or not all of it."""
KILLED = frozenset({124, 137})
"""`timeout`'s own exit codes for a command that it has ended."""
HINTS = {
    "job submit limit": "fix: the same launch submits what is missing, once jobs of yours have ended; "
    "with cluster.max_array_size=N it sends arrays of N tasks, as many as fit",
    "Invalid job array specification": "fix: cluster.max_array_size=N, at most what "
    "`scontrol show config | grep MaxArraySize` says",
}
"""What to do about a refusal, by some of its words."""
INTERRUPTED = (
    "interrupted while submitting; hpcdl status tells, a minute later at most, whether there is a job"
)
"""What Ctrl-C leaves behind."""


class Submission(Protocol):
    """What of a JobRequest matters here."""

    @property
    def token(self) -> str:
        """In the job's comment."""
        ...

    @property
    def runs_dir(self) -> Path:
        """The folder of all runs."""
        ...

    @property
    def run_dirs(self) -> tuple[Path, ...]:
        """The runs that it carries."""
        ...

    @property
    def folder(self) -> Path:
        """Where its own files lie."""
        ...


class LostAnswer(Exception):
    """It is not known whether the controller has taken the job; the words say why."""


class Unanswered(SchedulerError):
    """Slurm did not answer for as long as was waited; the job may have been made, and will be found."""


def told(error: Exception) -> Exception:
    """What submitit's error means: a refusal, or no answer."""
    cause = error.__cause__
    code = cause.returncode if isinstance(cause, subprocess.CalledProcessError) else None
    text = str(error).strip()
    if code in KILLED:
        return LostAnswer(f"sbatch gave no answer within {submissions.SBATCH_LIMIT_S:g} s")
    if (code is not None and code < 0) or code == 143:
        return LostAnswer(f"sbatch was killed (exit code {code})")
    words = [line for line in text.splitlines() if "sbatch:" in line or "slurm" in line.lower()]
    said = one_line(words) or " ".join(text.split()) or f"sbatch ended with code {code} and said nothing"
    if not text or NO_ANSWER.search(text):
        return LostAnswer(said)
    hints = [hint for words, hint in HINTS.items() if words.lower() in text.lower()]
    return SchedulerError("; ".join([f"sbatch refused the job: {said}", *hints]))


def submit(
    request: Submission,
    sbatch: Callable[[], str],
    *,
    slurm: Slurm | None = None,
    waits: patience.Patience | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """The id of the one job of this submission.

    Args:
        request: the submission.
        sbatch: runs it once; raises LostAnswer or SchedulerError.
        slurm: whom to ask for a job by its token.
        waits: how long to go on.
        sleep: between two looks.

    Raises:
        Unanswered: Slurm has not answered in time.
        SchedulerError: Slurm has refused the job.
    """
    slurm = slurm or Slurm()
    waits = waits or patience.Patience(patience.of_environment())
    while True:
        (request.folder / submissions.ASKED).touch()
        try:
            return submissions.settle(request.runs_dir, request.token, [sbatch()], slurm, waits.say)
        except LostAnswer as lost:
            why = str(lost)
        waits.say(f"no answer: {why}; looking whether Slurm has taken the job")
        found = _found(request, slurm, waits, why, sleep)
        if found is not None:
            waits.say(f"Slurm has taken the job all the same: {found}")
            return found
        if not waits.wait(why):
            raise _unanswered(why)


def _found(
    request: Submission,
    slurm: Slurm,
    waits: patience.Patience,
    why: str,
    sleep: Callable[[float], None],
) -> str | None:
    """The job, if the controller or the job's own files know of one; None where it surely knows of none."""
    runs = [RunDir(path) for path in request.run_dirs]
    looks = 0
    while looks < 2:
        job_id = submissions.job_of(request.runs_dir, request.token, runs[:1])
        if job_id is not None:
            return job_id
        ids, away = slurm.find({request.token})
        if away:
            looks = 0
            if not waits.wait(away):
                raise _unanswered(why)
            continue
        if found := ids.get(request.token, ()):
            return submissions.settle(request.runs_dir, request.token, found, slurm, waits.say)
        looks += 1
        if looks < 2:
            sleep(SETTLE_S)
    return None


def _unanswered(why: str) -> Unanswered:
    return Unanswered(
        f"Slurm does not answer: {why}\n"
        "Whether it has taken the job is not known yet. Nothing is lost or submitted twice: once Slurm answers,\n"
        "hpcdl status finds the job, and where there is none, the same launch submits it.\n"
        f"${patience.VARIABLE} says how long a launch waits (now {patience.of_environment():g} s)."
    )
