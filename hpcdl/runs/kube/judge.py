"""What a cluster's words for a run's Job and pods mean for the run's state. Decides only; writes nothing.

Where the launcher sees the volume, the agent's own words stand in state.json, and what is decided here is what nobody
in the pods could say: that they wait for a node, that the Job is suspended, deleted, over its time. Where it doesn't,
the pods' last words (their termination messages) say how the run has ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from hpcdl.runs import judge
from hpcdl.runs.judge import Verdict
from hpcdl.runs.kube.asking import Pod, Seen
from hpcdl.runs.state import ACTIVE, RunState
from hpcdl.runs.store import RunDir

Plain = dict[str, Any]
COMPLETE = ("Complete", "Completed")
DEADLINE = "DeadlineExceeded"
OUT_OF_MEMORY = "OOMKilled"
MEETING = ".pods"
"""What pods leave in the run's directory (hpcdl.launch.kube.meeting)."""
_FINAL = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED"})
_LONGEST = 400
"""Characters of Kubernetes' words in a reason."""


def sees_the_volume(run: RunDir) -> bool:
    """Whether the pods' files are in the directory that this machine has: state.json is the agent's own."""
    return (run.path / MEETING).is_dir()


def verdict(run: RunDir, state: RunState, seen: Seen, queue: str | None = None) -> Verdict | None:
    """What the state should say; None where it says it already.

    Args:
        run: the run.
        state: as it was read before the cluster was asked.
        seen: what the cluster has of it; its object is there.
        queue: Kueue's, where the object is in one.
    """
    assert seen.top is not None
    conditions = _conditions(seen.top)
    if done := next((conditions[name] for name in COMPLETE if name in conditions), None):
        step = _words(seen).get("step")
        return judge.final("COMPLETED", "", 0, "finished", ended=_time(done), step=step)
    if "Failed" in conditions:
        return _failed(run, state, seen, conditions["Failed"])
    if seen.top["metadata"].get("deletionTimestamp"):
        return _shown("Kubernetes is ending the Job; its pods have their time to save")
    if (seen.top.get("spec") or {}).get("suspend"):
        waits = f"waits in Kueue's queue {queue}" if queue else "suspended: somebody has to resume it"
        return _waiting(run, state, waits, moved="the Job was suspended")
    return _by_pods(run, state, seen)


def _by_pods(run: RunDir, state: RunState, seen: Seen) -> Verdict | None:
    count = state.nodes
    up = [pod for pod in seen.pods if pod.phase in ("Running", "Succeeded") and not pod.ending]
    waits = _why_waiting(seen.pods, count)
    if sees_the_volume(run):
        first = any(pod.index == 0 for pod in up)
        if state.state == "RUNNING" and not first:
            return _waiting(run, state, waits, moved=_why_moved(seen.pods, "the first pod"))
        return _shown(waits) if state.state == "PENDING" and waits else None
    if len(up) < count:
        return _waiting(run, state, waits, moved=_why_moved(seen.pods, "a pod"))
    if state.state == "PENDING":
        started = min((pod.started for pod in up if pod.started), default="")
        changes: Plain = {"state": "RUNNING", "reason": "", "node_list": tuple(pod.name for pod in up)}
        if state.started is None and started:
            changes["started"] = _utc(started)
        return Verdict(changes=changes)
    return None


def _waiting(run: RunDir, state: RunState, waits: str, moved: str) -> Verdict:
    if state.state == "PENDING":
        return _shown(waits)
    details = {"reason": moved, "requeues": state.requeues + 1, "way": "pods", "found_by": "poll"}
    return Verdict(changes={"state": "PENDING", "reason": f"{moved}; {waits}"}, event=("requeued", details))


def _why_waiting(pods: list[Pod], count: int) -> str:
    """The most telling reason of those that don't run."""
    down = [pod for pod in pods if pod.phase not in ("Running", "Succeeded") or pod.ending]
    missing = count - len(pods)
    said = sorted({pod.waits for pod in down if pod.waits}, key=_weight)
    if said:
        which = f"{len(down)} of {count} pods" if count > 1 else "the pod"
        return f"{which}: {said[0]}"[:_LONGEST]
    if down or missing > 0:
        return f"{len(down) + max(missing, 0)} of {count} pods are being made"
    return ""


def _weight(words: str) -> tuple[int, str]:
    """What a user must mend goes first."""
    telling = ("ImagePull", "ErrImage", "InvalidImage", "CreateContainer", "CrashLoop", "RunContainer")
    return (0 if words.startswith(telling) else 1 if words.startswith("Unschedul") else 2, words)


def _why_moved(pods: list[Pod], which: str) -> str:
    why = next((pod.disrupted for pod in pods if pod.disrupted), "")
    return f"{which} is gone{f' ({why})' if why else ''}; the Job makes it anew"[:_LONGEST]


def _failed(run: RunDir, state: RunState, seen: Seen, condition: Plain) -> Verdict:
    ended, words = _time(condition), _words(seen)
    reason, message = str(condition.get("reason") or ""), str(condition.get("message") or "")
    own = words if words.get("submission") == state.submission and words.get("state") in _FINAL else {}
    if own:
        word, code = str(own["state"]), own.get("exit_code")
        kind = "cancelled" if word == "CANCELLED" else "failed"
        more = {} if kind == "cancelled" else {"traceback": ""}
        exit_code = code if isinstance(code, int) else None
        return judge.final(word, str(own.get("reason") or ""), exit_code, kind, ended=ended, **more)
    if reason == DEADLINE:
        text = "the Job reached its time limit (cluster.time_min); hpcdl resubmit goes on from the last checkpoint"
        return judge.final("TIMEOUT", text, 1, "failed", ended=ended, traceback="")
    for pod in seen.pods:
        if pod.reason == OUT_OF_MEMORY:
            text = f"pod {pod.name} was killed because its memory was used up: raise cluster.mem_gb"
            return judge.final("OUT_OF_MEMORY", text, pod.exit_code, "failed", ended=ended, traceback="")
    told = next((str(pod.words["why"]) for pod in seen.pods if pod.words.get("why")), "")
    told = told or next((pod.said.splitlines()[-1] for pod in seen.pods if pod.said and pod.exit_code), "")
    code = next((pod.exit_code for pod in seen.pods if pod.exit_code), None)
    text = f"the Job has failed: {reason}: {message}" if message else f"the Job has failed: {reason}"
    text = f"{told}; {text}" if told else text
    return judge.ended_by_itself(run, state, "FAILED", text, exit_code=code or 1, ended=ended)


def gone(run: RunDir, state: RunState, *, wished: bool, job: str) -> Verdict:
    """A run whose object is there no more, and whose agent has left no last word."""
    if wished:
        return judge.final("CANCELLED", "cancelled", None, "cancelled", by="cancel")
    found = judge.ended_by_itself(run, state, "CANCELLED", "")
    if found.changes["state"] in ("CANCELLED", *ACTIVE):
        reason = f"its {job} is gone: somebody has deleted it"
        return judge.final("CANCELLED", reason, None, "cancelled", by="kubernetes")
    return found


def _shown(reason: str) -> Verdict:
    return Verdict(changes={"reason": reason}, write=False)


def _words(seen: Seen) -> Mapping[str, Any]:
    return next((pod.words for pod in seen.pods if pod.index == 0 and pod.words), {})


def _conditions(top: Plain) -> dict[str, Plain]:
    found = (top.get("status") or {}).get("conditions") or ()
    return {str(one.get("type")): one for one in found if one.get("status") == "True"}


def _time(condition: Plain) -> str | None:
    return _utc(str(condition.get("lastTransitionTime") or ""))


def _utc(time: str) -> str | None:
    try:
        return datetime.fromisoformat(time.replace("Z", "+00:00")).isoformat(timespec="milliseconds")
    except ValueError:
        return None
