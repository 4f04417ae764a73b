"""Submissions whose answer was lost: which job is it, if any, and may it be judged that there is none?

The job is found, in this order, by the submission's record, by what its own agents have written into the runs'
states, by the name of Slurm's output file (which holds the job's id), and by the token in the job's comment. The
first three hold for ever, also when Slurm has forgotten the job.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hpcdl.runs import processes
from hpcdl.runs.scheduler import Slurm
from hpcdl.runs.store import SUBMISSIONS, RunDir, decide_job, read_submission

SBATCH_LIMIT_S = 60.0
"""How long one sbatch may take; then it is killed, and whether it got through is found out."""
SBATCH_GRACE_S = SBATCH_LIMIT_S + 10.0
"""A launcher that dies may leave its sbatch behind, which can still succeed for this long."""
ELSEWHERE_GRACE_S = 900.0
"""A launcher on another machine can't be looked at; it gives up long before this."""
ASKED = "asked"
"""File of a submission's folder that the launcher touches before each sbatch."""
_OUTPUT = re.compile(r"slurm-(\d+)(?:_\d+)?\.out")


def job_of(runs_dir: Path, token: str, runs: Iterable[RunDir]) -> str | None:
    """The submission's job as far as files tell, without a task; it is written down if it wasn't.

    Args:
        runs_dir: the folder of all runs.
        token: names the submission.
        runs: runs that it carries.
    """
    known = read_submission(runs_dir, token).get("job_id")
    if known is not None:
        return str(known)
    found = {job_id for run in runs if (job_id := _of_state(run, token))} or _of_outputs(runs_dir, token)
    return decide_job(runs_dir, token, min(found, key=int)) if found else None


def _of_state(run: RunDir, token: str) -> str | None:
    """What the run's agent has written down."""
    try:
        state = run.read_state()
    except FileNotFoundError:
        return None
    if state.submission != token or state.job_id is None:
        return None
    return state.job_id.partition("_")[0]


def _of_outputs(runs_dir: Path, token: str) -> set[str]:
    try:
        names = os.listdir(runs_dir / SUBMISSIONS / token)  # noqa: PTH208 (a file a task of a long array)
    except OSError:
        return set()
    return {found.group(1) for name in names if (found := _OUTPUT.fullmatch(name))}


def settle(runs_dir: Path, token: str, ids: Iterable[str], slurm: Slurm, say: Callable[[str], None]) -> str:
    """Of the jobs that were found for one submission, the one that counts; the others are cancelled.

    Raises:
        SchedulerError: the others could not be cancelled. Their agents will see that they are not meant.
    """
    ids = sorted(ids, key=int)
    chosen = decide_job(runs_dir, token, ids[0])
    others = [i for i in ids if i != chosen]
    if others:
        say(
            f"submission {token} has reached Slurm {len({*ids, chosen})} times: {', '.join(others)} cancelled"
        )
        slurm.cancel(others)
    return chosen


def may_still_come(runs_dir: Path, token: str | None, created: str) -> bool:
    """Whether a job may still be made of a submission that Slurm doesn't know of.

    Args:
        runs_dir: the folder of all runs.
        token: names the submission.
        created: when the run was launched.
    """
    record = read_submission(runs_dir, token) if token else {}
    if record.get("unanswered"):
        return False  # the launcher has given up in order: no sbatch of its is left
    if launcher_lives(record):
        return True
    age = min(age_s(record.get("created") or created), _touched_s(runs_dir, token))
    here = record.get("host") in (None, os.uname().nodename)
    return age < (SBATCH_GRACE_S if here else ELSEWHERE_GRACE_S)


def launcher_lives(record: dict[str, Any]) -> bool:
    """Whether the process that submits is still there; False where it is another machine's."""
    pid, started = record.get("pid"), record.get("pid_started")
    return (
        isinstance(pid, int) and record.get("host") == os.uname().nodename and processes.alive(pid, started)
    )


def _touched_s(runs_dir: Path, token: str | None) -> float:
    """Seconds since sbatch was run last."""
    if token is None:
        return float("inf")
    try:
        time = (runs_dir / SUBMISSIONS / token / ASKED).stat().st_mtime
    except OSError:
        return float("inf")
    return datetime.now(UTC).timestamp() - time


def age_s(created: str) -> float:
    """Seconds since a time; a long time where there is none."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(created)) / timedelta(seconds=1)
    except ValueError:
        return float("inf")
