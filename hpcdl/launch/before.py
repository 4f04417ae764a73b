"""The try before this one, where it ended without a word: its first node was lost, and Slurm has started the job anew.

Nobody was there to say so. The next try's agent says it, with what Slurm knows of the nodes.
"""

from __future__ import annotations

from typing import Any

from hpcdl.errors import RunFailedError
from hpcdl.launch import nodes, progress
from hpcdl.runs.store import RunDir

_LAST_WORDS = frozenset({"started", "restarting", "requeued", "failed", "finished", "cancelled", "submitted"})


def lost(run: RunDir, attempt: str, by: str = "Slurm") -> tuple[str, dict[str, Any]] | None:
    """The event that tells of it; None where that try has said how it ended.

    Args:
        run: the run.
        attempt: this try.
        by: whose job it is: who else may have ended it.
    """
    events = [event for event in run.events() if event.get("event") in _LAST_WORDS]
    if not events:
        return None
    last = events[-1]
    # A poll, which found the job back in the queue, doesn't know why either.
    unexplained = last["event"] == "requeued" and last.get("found_by") == "poll" and "kind" not in last
    if last["event"] != "started" and not unexplained:
        return None
    started = next((event for event in reversed(events) if event["event"] == "started"), None)
    if started is None or started.get("try") == attempt:
        return None
    names = [str(name) for name in started.get("node_list", ())]
    down = nodes.down(names) if by == "Slurm" else {}
    where = ", ".join(f"{name} is {state}" for name, state in down.items())
    why = f"a node was lost: {where}" if down else f"a node was lost, or {by} has ended it"
    message = f"try {started.get('try')} on {', '.join(names)} left no last word: {why}"
    return progress.LOST, {
        "try": started.get("try"),
        "node_list": names,
        "down": sorted(down),
        "saved": progress.saved(run),
        "message": message,
    }


def tell(run: RunDir, attempt: str, max_requeues: int, by: str = "Slurm") -> None:
    """Tells of it, and ends the run where that goes on and on: Slurm itself never stops starting a job anew.

    Args:
        run: the run.
        attempt: this try.
        max_requeues: cluster.max_requeues. What Slurm does by itself it may do some times in any case.
        by: whose job it is.

    Raises:
        RunFailedError: so many tries were lost without any progress.
    """
    event = lost(run, attempt, by)
    if event is None:
        return
    past = progress.history(run.events(), int(attempt.partition(".")[0]))
    limits = progress.Limits(max_restarts=0, max_requeues=max(max_requeues, progress.SAME_STEP))
    decided = progress.verdict(past, progress.lost(event[1]["saved"]), limits)
    run.event(event[0], **event[1])
    if decided.then == "stop":
        raise RunFailedError(f"{event[1]['message']}; {decided.why}")
