"""From what is known of an active run to what its state should say. Decides only; writes nothing."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hpcdl.runs import chain, failure, parents
from hpcdl.runs.slurm_text import Job
from hpcdl.runs.state import RunState
from hpcdl.runs.store import RunDir, now

NO_LOG = "it will never write a log"
QUEUE_WORDS = {
    "BeginTime": "its begin time lies ahead",
    "Priority": "other jobs come first",
    "Resources": "waits for nodes to become free",
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": "the job it waits for has failed: it will never start",
    "JobArrayTaskLimit": "the array runs as many tasks as its % allows",
    "JobHeldUser": "held: scontrol release starts it",
    "JobHeldAdmin": "held by an administrator",
    "PartitionTimeLimit": "asks for more time than the partition allows: it will never start",
    "PartitionNodeLimit": "asks for more nodes than the partition has: it will never start",
    "ReqNodeNotAvail": "nodes it needs are down or reserved",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "Prolog": "the nodes are being prepared",
    "None": "",
}
"""What Slurm's most common reasons mean."""
ON_NODES = frozenset({"RUNNING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"})
"""Slurm's words for a job that has its nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the state should say."""

    changes: dict[str, Any]
    event: tuple[str, dict[str, Any]] | None = None
    write: bool = True
    """Whether it goes into state.json; the queue's reason, which changes by the minute, is only shown."""


def agent_gone(run: RunDir, state: RunState, *, rebooted: bool) -> Verdict:
    """A local run whose agent is no longer there and left no final state."""
    how = "the machine was restarted" if rebooted else "killed (kill -9, or the kernel for want of memory)"
    return ended_by_itself(
        run, state, "FAILED", f"the agent, process {state.agent_pid}, left no last word: {how}"
    )


def never_started(why: str) -> Verdict:
    """A run that never reached its scheduler, or its turn on this machine."""
    reason = f"never started: {why}; launch it again"
    return final("FAILED", reason, None, "failed", traceback="")


def in_vain(why: str, found_by: str = "poll") -> Verdict:
    """A run that waited for another one, which has not succeeded."""
    return final("CANCELLED", f"{why}; {NO_LOG}", None, "cancelled", by="dependency", found_by=found_by)


def forgotten(run: RunDir, state: RunState) -> Verdict:
    """A job that the controller doesn't know, nor the accounting, and whose agent left no final state.

    An array's task that is cancelled before Slurm has split it off leaves no record anywhere, while its
    siblings go on (seen on 22.05). A job that has started leaves at least its output file.
    """
    gone = f"Slurm knows no job {state.job_id} any more"
    if failure.log_files(run, state.attempt):
        return ended_by_itself(run, state, "FAILED", f"{gone}, and its agent left no last word")
    output = failure.own_output(run, state)
    if output is None and (vain := parents.failed(parents.of_submission(run.runs_dir, state.submission))):
        return in_vain(vain)
    if output is None:
        return final("CANCELLED", f"cancelled while pending; {NO_LOG}", None, "cancelled", by="scancel")
    said = failure.last_words(output)
    reason = f"{gone}; it ended before its agent had started{': ' + said if said else ''}"
    return ended_by_itself(run, state, "FAILED", reason)


def by_slurm(run: RunDir, state: RunState, job: Job) -> Verdict | None:
    """What Slurm's word for the job means for the run; None where the state says it already."""
    if job.ended:
        return _by_end(run, state, job)
    if job.waiting:
        return _waiting(run, state, job)
    if job.state == "COMPLETING":  # the end, or a requeue, under way: a later poll knows which
        reason = state.reason or "Slurm is ending the job (COMPLETING)"
        return Verdict(changes={"reason": reason}, write=False)
    if job.state == "CONFIGURING":
        return Verdict(changes={"reason": "the nodes are being started"}, write=False)
    if job.state == "SUSPENDED":
        return Verdict(changes={"reason": "suspended by Slurm"}, write=False)
    if job.state not in ON_NODES:
        return None
    if state.state == "PENDING" and job.start is not None and job.start >= _requeued_at(run, state):
        changes = {"state": "RUNNING", "reason": "", "started": state.started or job.start}
        return Verdict(changes={**changes, "node_list": job.node_list})
    return None


def queue_reason(job: Job, state: RunState) -> str:
    """Why a job waits, in words, and when it is expected to start."""
    word = job.reason
    meaning = QUEUE_WORDS.get(word, "")
    if word == "BeginTime" and state.requeues:
        meaning = "Slurm starts a requeued job about two minutes later"
    text = f"{word}: {meaning}" if meaning else word
    if job.start is not None:
        text = (
            f"{text}; expected to start {clock(job.start)}"
            if text
            else f"expected to start {clock(job.start)}"
        )
    return text


def _waiting(run: RunDir, state: RunState, job: Job) -> Verdict:
    reason = queue_reason(job, state)
    # Until its scheduler has looked at a new job, Slurm gives no reason at all (a second, or ten on a busy one).
    if job.reason in ("", "Dependency"):
        waits = parents.waits_for(parents.of_submission(run.runs_dir, state.submission))
        before = chain.link(run.runs_dir, state.submission) if job.reason else None
        if before is not None:
            waits = f"waits for the end of job {before.job_id}, which it goes on with"
        reason = f"Dependency: {waits}" if waits else reason
    if state.state == "PENDING":
        return Verdict(changes={"reason": reason}, write=False)
    # Slurm put it back itself (pre-empted, a node failed): the agent had no time to say so. The agent of
    # the next try counts the requeue, from $SLURM_RESTART_COUNT.
    details = {"reason": "Slurm put the job back into its queue", "requeues": state.requeues + 1}
    event = ("requeued", {**details, "way": "slurm", "found_by": "poll"})
    return Verdict(changes={"state": "PENDING", "reason": "put back into the queue by Slurm"}, event=event)


def _by_end(run: RunDir, state: RunState, job: Job) -> Verdict:
    nodes = ", ".join(job.node_list[:4]) + (", …" if len(job.node_list) > 4 else "")
    words = {
        "TIMEOUT": "the job reached its time limit",
        "OUT_OF_MEMORY": "a process was killed because the job's memory was used up: raise cluster.mem_gb",
        "NODE_FAIL": f"a node failed under the job ({nodes})" if nodes else "a node failed under the job",
        "PREEMPTED": "pre-empted by a job of higher priority, and not put back into the queue",
        "BOOT_FAIL": "its nodes could not be started (BOOT_FAIL)",
        "DEADLINE": "it could not end before its deadline (DEADLINE)",
        "REVOKED": "the job runs on another cluster (REVOKED)",
    }
    never_ran = not failure.log_files(run, state.attempt)
    if job.state == "CANCELLED" and never_ran and not job.node_list:
        awaited = parents.of_submission(run.runs_dir, state.submission)
        vain = parents.failed(awaited)
        if not vain and awaited and job.reason.startswith("Dependency"):
            vain = f"{' or '.join(p.name for p in awaited)}, which it waited for, did not succeed"
        if vain:
            return in_vain(vain)
    if job.state == "CANCELLED":
        reason = (
            f"cancelled while pending; {NO_LOG}" if never_ran and not job.node_list else "cancelled (scancel)"
        )
        return final("CANCELLED", reason, job.exit_code, "cancelled", ended=job.end, by="scancel")
    if job.state in words:
        word = job.state if job.state in ("TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED") else "FAILED"
        return final(word, words[job.state], job.exit_code, "failed", ended=job.end, traceback="")
    reason = _exit_words(job)
    if never_ran:
        said = failure.last_words(failure.own_output(run, state))
        reason += f" before the agent had started{': ' + said if said else ''}"
    return ended_by_itself(run, state, "FAILED", reason, exit_code=job.exit_code, ended=job.end)


def _exit_words(job: Job) -> str:
    code = job.exit_code
    if code is None:
        return "the job failed"
    if 128 < code <= 128 + signal.SIGRTMAX:
        return f"the job ended with exit code {code} (signal {code - 128})"
    if code == 0:
        return "Slurm counts the job as done, but training left no outcome"
    return f"the job ended with exit code {code}"


def ended_by_itself(
    run: RunDir,
    state: RunState,
    word: str,
    reason: str,
    *,
    exit_code: int | None = None,
    ended: str | None = None,
) -> Verdict:
    """The end of a run whose agent could not say it: the workers' own files go before our guess."""
    out = failure.outcome(run)
    slurm_failed = exit_code not in (None, 0)
    if out.get("status") == "finished" and not slurm_failed:
        return final("COMPLETED", "", 0, "finished", ended=ended, step=out.get("step"))
    if out.get("status") == "stopped" and not slurm_failed:
        why = f"stopped at step {out.get('step')}: {out.get('reason')}"
        if state.kind == "local" or out.get("reason") == "cancel":
            return final("CANCELLED", why, exit_code, "cancelled", ended=ended, by=str(out.get("reason")))
        reason = f"{why}, and was not put back into the queue"
    cause = failure.root_cause(run)
    if cause is not None and cause.out_of_memory:
        word = "OUT_OF_MEMORY"
    traceback = cause.traceback if cause else ""
    return final(word, cause.text if cause else reason, exit_code, "failed", ended=ended, traceback=traceback)


def final(
    word: str, reason: str, exit_code: int | None, kind: str, *, ended: str | None = None, **details: Any
) -> Verdict:
    """The end of a run that a look has found.

    Args:
        word: the state.
        reason: why.
        exit_code: the run's, where it is known.
        kind: of the event.
        ended: when; None: now.
        **details: for the event.
    """
    if word != "COMPLETED":
        # Slurm counts some ends with code 0 (a node's failure, the time limit): no 0 for what has failed.
        exit_code = exit_code or (None if word == "CANCELLED" else 1)
    said = {} if kind == "finished" else {"reason": reason}
    changes = {"state": word, "reason": reason, "exit_code": exit_code, "ended": ended or now()}
    return Verdict(changes=changes, event=(kind, {"found_by": "poll", **said, **details}))


def _requeued_at(run: RunDir, state: RunState) -> str:
    """When the run was last put back: a job seen running since before that is the old try, going down."""
    if not state.requeues:
        return ""
    return max((str(e.get("time", "")) for e in run.events() if e.get("event") == "requeued"), default="")


def clock(time: str) -> str:
    """A time for people: local, with the day where it isn't today."""
    local = datetime.fromisoformat(time).astimezone()
    today = datetime.now(UTC).astimezone().date()
    return f"{local:%H:%M:%S}" if local.date() == today else f"{local:%Y-%m-%d %H:%M}"
