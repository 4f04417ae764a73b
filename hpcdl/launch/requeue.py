"""A job that must end although its run is not over: how the run goes on.

Two ways, chosen by `cluster.requeue`:

    requeue     `scontrol requeue`: the same job, its priority and its place in the array. Slurm holds it back for
                two minutes (the life of its credentials), unless somebody who looks at the run from a login node
                asks it not to (hpcdl.runs.hurry)
    successor   another job (hpcdl.launch.successor), which starts as soon as this one has ended
    auto        a successor; but a requeue where jobs wait for this one's success, where the array lets only some
                of its tasks run at a time, and where there can't be one (no sbatch on the nodes, Slurm refuses)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hpcdl.errors import HpcdlError
from hpcdl.launch import control, dependents, successor
from hpcdl.launch.place import Place
from hpcdl.runs import chain
from hpcdl.runs.store import RunDir

How = Literal["auto", "requeue", "successor"]
HANDED_OVER = 75
"""Exit code of a job whose successor goes on (sysexits.h: EX_TEMPFAIL). No 0: a job of somebody's that waits for
this one's success must not start on half a training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """How the run goes on."""

    refused: str = ""
    """Why it doesn't: Slurm's words. Empty where it does."""
    job_id: str = ""
    """The job that goes on, `123_4`; it is pending."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the run's state that change with the job."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """For the event: the way that was taken, and why not the quicker one."""
    exit_code: int = 0
    """What this job ends with."""


BY_SLURM = Again(details={"way": "slurm"})
"""Slurm has put the job back into the queue by itself."""


def again(run: RunDir, place: Place, how: How, say: Callable[[str], None]) -> Again:
    """Sees to it that the run goes on after this job's end.

    Args:
        run: the run.
        place: this job.
        how: cluster.requeue. A run of Kubernetes' goes on in the same Job: its pods wait for each other, and those
            that are gone are made anew (hpcdl.launch.kube).
        say: takes a remark for the log.
    """
    assert place.job_id is not None
    if place.kind == "kubernetes":
        return Again(job_id=place.job_id, details={"way": "pods"})
    why = ""
    if how != "requeue":
        why = successor.obstacle(run, place, forced=how == "successor")
        if not why:
            try:
                return _handed_over(place, successor.submit(run, place, say), say)
            except (HpcdlError, OSError) as error:
                why = " ".join(str(error).split())
    back = control.requeue(place.job_id, place.restarts)
    if back.by_slurm:
        return BY_SLURM
    if back.refused:
        return Again(refused=f"{back.refused}; nor was there a successor: {why}" if why else back.refused)
    details: dict[str, Any] = {"way": "requeue", **({"no_successor": why} if why else {})}
    return Again(job_id=place.job_id, details=details)


def _handed_over(place: Place, job_id: str, say: Callable[[str], None]) -> Again:
    assert place.job_id is not None
    token = chain.token_after(place.token, place.index)
    known = chain.Link(
        token=place.token, array_index=place.index, job_id=place.job_id, tries=place.requeue + 1
    )
    changes = chain.taken(token, job_id)
    dependents.move(place.job_id, changes["job_id"], say)
    return Again(
        job_id=changes["job_id"],
        changes=changes,
        details=chain.moved(known, job_id),
        exit_code=HANDED_OVER,
    )
