"""A run's jobs one after the other: one that must end early may submit its successor, which takes the run over.

The order is sbatch first, the run's state after: killed in between, the agent leaves a state that names the old
job, and a successor in the queue that waits for the old job's end. So the successor is found from either side.

- It owns the run (`owns`) if the state names its own submission, or the one that it continues while the run is
  not over. Whoever launches the run again meanwhile has changed the state, and the successor does nothing.
- A poll that finds the old job over looks for the successor (`follow`) before it judges.
- The old job may be started again by Slurm (its node died): the state still names it, it goes on, and the
  successor still waits for its end. There is one successor of a submission's task and no more (`token_after`):
  when the old job comes to ask for it again, it finds it there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpcdl.runs import submissions
from hpcdl.runs.scheduler import Slurm
from hpcdl.runs.state import ACTIVE, RunState
from hpcdl.runs.store import RunDir, read_submission

KEY = "continues"
"""The link's key in a successor's submission.json."""
INDEX = 0
"""A successor's only array task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What a successor goes on with."""

    token: str
    """The submission that it takes the run over from."""
    array_index: int
    """The run's task there."""
    job_id: str
    """The job whose end it waits for: `123_4`."""
    tries: int
    """Starts of jobs in this launch before its own: the number of its first try."""

    def plain(self) -> dict[str, Any]:
        """For submission.json."""
        return asdict(self)


def token_after(token: str, index: int) -> str:
    """The submission that continues a task of another; there is one only."""
    return hashlib.sha256(f"{token} {index} goes on".encode()).hexdigest()[:12]


def link(runs_dir: Path, token: str | None) -> Link | None:
    """What a submission continues; None for one that a launch has made."""
    plain = read_submission(runs_dir, token).get(KEY) if token else None
    return Link(**plain) if isinstance(plain, dict) else None


def tries_before(runs_dir: Path, token: str) -> int:
    """Starts of jobs in this launch before the submission's own job."""
    found = link(runs_dir, token)
    return found.tries if found else 0


def owns(run: RunDir, state: RunState, token: str, index: int) -> bool:
    """Whether the job of a submission's task is the one that has to run this run."""
    if (state.submission, state.array_index) == (token, index):
        return True
    before = link(run.runs_dir, token)
    return (
        before is not None
        and index == INDEX
        and state.state in ACTIVE
        and (state.submission, state.array_index) == (before.token, before.array_index)
    )


def earlier_jobs(runs_dir: Path, token: str | None) -> Iterator[str]:
    """The jobs that a submission continues, the last one first."""
    found = link(runs_dir, token)
    while found is not None:
        yield found.job_id
        found = link(runs_dir, found.token)


def follow(run: RunDir, state: RunState, slurm: Slurm) -> RunState | None:
    """The state handed over to the successor of a job that has ended without saying so; None without one.

    Args:
        run: the run.
        state: as it was read before the scheduler was asked.
        slurm: whom to ask for a successor whose sbatch wasn't answered.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    if state.submission is None or state.array_index is None:
        return None
    token = token_after(state.submission, state.array_index)
    known = link(run.runs_dir, token)
    if known is None or known.job_id != state.job_id:
        return None
    job_id = submissions.job_of(run.runs_dir, token, [run])
    if job_id is None:
        ids, away = slurm.find({token})
        if away or not ids.get(token):
            return None
        job_id = submissions.settle(run.runs_dir, token, ids[token], slurm, lambda _: None)
    reason = f"job {known.job_id} has ended; job {job_id} continues it"
    event = ("requeued", {"reason": reason, **moved(known, job_id), "found_by": "poll"})
    return run.update(
        expect=state, event=event, reason=reason, requeues=state.requeues + 1, **taken(token, job_id)
    )


def taken(token: str, job_id: str) -> dict[str, Any]:
    """The fields of a state that has been handed over to a successor."""
    return {
        "state": "PENDING",
        "submission": token,
        "array_index": INDEX,
        "job_id": f"{job_id}_{INDEX}",
    }


def moved(known: Link, job_id: str) -> dict[str, str]:
    """What the event of a handing over tells."""
    return {"way": "successor", "job_id": f"{job_id}_{INDEX}", "continues": known.job_id}
