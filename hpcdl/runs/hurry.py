"""A job that Slurm has put back into its queue starts about two minutes later, even on an idle cluster.

An ordinary user may ask that it start now (`scontrol update StartTime=now`), but only once it is PENDING: the same
call while the job is COMPLETING is accepted and has no effect. So the job can't do it for itself; whoever looks
at the run from a login node does it. A begin time that the user has asked for stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from hpcdl.runs import private
from hpcdl.runs.reconcile import View
from hpcdl.runs.scheduler import Slurm
from hpcdl.runs.store import RunDir

AHEAD_S = 5.0
"""A job that would start sooner is left alone."""
SETTLED_S = 3.0
"""Since the requeue; some clocks are a second off."""


def hurry(views: Iterable[View], slurm: Slurm | None = None) -> list[View]:
    """The same runs; those of their jobs that Slurm holds back after a requeue are asked to start now."""
    slurm = slurm or Slurm()
    return [_hurry(view, slurm) for view in views]


def _hurry(view: View, slurm: Slurm) -> View:
    job, job_id = view.job, view.state.job_id
    if job is None or job_id is None or not job.waiting or job.reason != "BeginTime" or job.start is None:
        return view
    ahead = datetime.fromisoformat(job.start) - datetime.now(UTC)
    if ahead < timedelta(seconds=AHEAD_S) or not _settled(view.run) or not private.is_mine(view.run.path):
        return view
    if not slurm.start_now(job_id):
        return view
    view.run.event("hastened", job_id=job_id, begin_time=job.start)
    reason = f"requeued; asked to start now, {ahead.total_seconds():.0f} s before Slurm would have"
    return dataclasses.replace(view, state=dataclasses.replace(view.state, reason=reason))


def requeued(run: RunDir) -> bool:
    """Whether a job of the run's present launch has been put back into the queue."""
    return _requeue(run) is not None


def _requeue(run: RunDir) -> dict[str, Any] | None:
    """The event that tells of it."""
    for event in reversed(run.events()):
        if event.get("event") in ("requeued", "submitted"):
            return event if event["event"] == "requeued" else None
    return None


def _settled(run: RunDir) -> bool:
    """Whether a job was put back, and its last try's end is over on its nodes."""
    event = _requeue(run)
    if event is None:
        return False
    return datetime.now(UTC) - datetime.fromisoformat(event["time"]) >= timedelta(seconds=SETTLED_S)
