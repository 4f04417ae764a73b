"""Whether a job that has started has anything to do: asked once on each node, before anything is imported.

- A second job of one submission ends at once: sbatch was run anew when its first answer was late, and both got
  through.
- A run whose cancel was wished while Slurm could not be told ends before it trains.
- A run that waits for others looks at them itself. Slurm has let it start because their jobs have ended well, but
  a run may go on in another job. Then this job goes back into the queue.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from hpcdl.launch import control
from hpcdl.launch.place import Place
from hpcdl.runs import parents, wish
from hpcdl.runs.parents import Parent
from hpcdl.runs.reconcile import look
from hpcdl.runs.state import ACTIVE
from hpcdl.runs.store import RunDir, decide_job, now

INTERRUPTED = 130
SEEN_AFTER_S = 60.0
"""A parent's last word may reach this node's copy of a shared disk late (NFS keeps what it has read)."""
POLL_S = 1.0
LOOK_S = 10.0


def nothing_to_do(run: RunDir, place: Place) -> int | None:
    """The exit code of a job that has nothing to do; None for one that has.

    Args:
        run: the run that this job carries.
        place: which part of which job this is.
    """
    if _is_second(run, place):
        return 0
    if not place.first:
        return None  # the first node's agent decides; its end is this one's
    if wish.of(run):
        return cancel(run, place.token, "cancelled before it had started", by="cancel")
    return _after(run, place)


def _is_second(run: RunDir, place: Place) -> bool:
    if place.job_id is None:
        return False
    mine = place.job_id.partition("_")[0]
    meant = decide_job(run.runs_dir, place.token, mine)
    if meant == mine:
        return False
    words = (
        f"submission {place.token} reached Slurm twice, and its job is {meant}: job {mine} has nothing to do"
    )
    print(f"hpcdl: {words}", file=sys.stderr)
    return True


def _after(run: RunDir, place: Place) -> int | None:
    awaited = parents.of_submission(run.runs_dir, place.token)
    deadline = time.monotonic() + (SEEN_AFTER_S if place.kind == "slurm" else 0.0)
    looks = Looks()
    while left := parents.unfinished(awaited):
        looks.at(left)
        if why := parents.failed(left):
            return cancel(run, place.token, why, by="dependency")
        if time.monotonic() >= deadline:
            return _back(run, place, parents.waits_for(left))
        time.sleep(POLL_S)
    return None


class Looks:
    """Finds out now and then whether what is waited for still lives: its agent may have left no last word, and a
    task that was cancelled before it had started left none at all (Slurm then counts a wait for it as over).
    """

    def __init__(self) -> None:
        self._next = 0.0

    def at(self, awaited: Sequence[Parent]) -> None:
        """Makes the states of these runs true, if it is time to."""
        if time.monotonic() < self._next:
            return
        for parent in awaited:
            if parent.run is not None and parent.run.state_file.exists():
                look(parent.run)
        self._next = time.monotonic() + LOOK_S


def _back(run: RunDir, place: Place, why: str) -> int:
    """Into the queue again, for Slurm to start it some minutes later."""
    refused = control.requeue(place.job_id, place.restarts).refused if place.job_id else "no job"
    if refused:
        why = f"{why}, and can't go back into the queue: {refused}"
        return cancel(run, place.token, why, by="dependency")
    run.update(event=("waits", {"reason": why}), state="PENDING", reason=why)
    return 0


def cancel(run: RunDir, token: str, why: str, *, by: str) -> int:
    """Ends a run of a submission that has not started; returns the exit code."""
    state = run.read_state()
    if state.state in ACTIVE and state.submission == token:
        changes: dict[str, Any] = {
            "state": "CANCELLED",
            "reason": why,
            "exit_code": INTERRUPTED,
            "ended": now(),
        }
        run.update(expect=state, event=("cancelled", {"by": by, "reason": why}), **changes)
    print(f"hpcdl: {run.path}: {why}", file=sys.stderr, flush=True)
    return INTERRUPTED
