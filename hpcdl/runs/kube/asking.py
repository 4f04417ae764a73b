"""What a cluster says of runs: one list of Jobs and one of pods for all of them, read as it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcdl.runs.kube import names
from hpcdl.runs.kube.client import Api
from hpcdl.runs.store import read_submission

Plain = dict[str, Any]
Connect = Callable[[str | None, str | None], Api]
MANAGED = ",".join(f"{key}={value}" for key, value in names.MANAGED.items())
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_MOST = 2000
"""Characters of a pod's last words that are read."""


@dataclass(frozen=True, slots=True)
class Where:
    """Where a submission's objects are."""

    context: str | None
    namespace: str
    kind: str
    """Job, JobSet or TrainJob."""
    base: str
    """What their names begin with."""
    sent: bool = False
    """Whether all of them were made."""
    ttl_s: float | None = None
    """How long an object is kept after its end; None: for ever."""


def where(runs_dir: Path, token: str | None) -> Where | None:
    """What the launcher has noted of a submission; None where it came to nothing that could be."""
    record = read_submission(runs_dir, token) if token else {}
    plain = record.get("kubernetes")
    if not isinstance(plain, Mapping):
        return None
    context, namespace, base = plain.get("context"), str(plain.get("namespace")), str(plain.get("base"))
    kinds = {kind for *_, kind in names.KINDS.values()}
    if not (_LABEL.fullmatch(namespace) and _LABEL.fullmatch(base) and plain.get("kind") in kinds):
        return None  # somebody else may have written it
    ttl_s = plain.get("ttl_s")
    return Where(
        context=str(context) if context is not None else None,
        namespace=namespace,
        kind=str(plain["kind"]),
        base=base,
        sent=bool(record.get("sent")),
        ttl_s=ttl_s if isinstance(ttl_s, int) else None,
    )


@dataclass(slots=True)
class Pod:
    """One pod of a run, as far as it matters."""

    name: str
    index: int | None
    phase: str
    """Pending, Running, Succeeded, Failed, Unknown."""
    ending: bool
    """Whether it was told to end."""
    disrupted: str
    """Why Kubernetes took it away; empty where it didn't."""
    waits: str
    """Why it doesn't run yet, in Kubernetes' words."""
    exit_code: int | None
    reason: str
    """Of its end: OOMKilled, Error, …"""
    started: str
    words: Mapping[str, Any] = field(default_factory=dict)
    """Its last words (hpcdl.launch.kube.pod); empty before its end."""
    said: str = ""
    """The same as text, where they are no JSON: the end of its log."""


@dataclass(slots=True)
class Seen:
    """What the cluster has of one run."""

    top: Plain | None = None
    """The Job, JobSet or TrainJob."""
    job: Plain | None = None
    """The Job whose pods train: the same, or the child of a JobSet's."""
    pods: list[Pod] = field(default_factory=list)
    """The newest of each index."""


def ask(api: Api, kind: str, wanted: Iterable[str]) -> dict[str, Seen]:
    """What there is of the runs of one namespace, by the names of their Jobs.

    Raises:
        Away: the API server does not answer.
        SchedulerError: it refuses.
    """
    found = {name: Seen() for name in wanted}
    pods: dict[tuple[str, int | None], Plain] = {}
    if kind != "Job":
        for one in api.list(kind, MANAGED):
            if one["metadata"]["name"] in found:
                found[one["metadata"]["name"]].top = one
    for one in api.list("Job", MANAGED):
        meta = one["metadata"]
        seen = found.get((meta.get("labels") or {}).get(names.JOB, meta["name"]))
        if seen is not None:
            seen.job = one
            if kind == "Job":
                seen.top = one
    for one in api.list("Pod", MANAGED):
        key = (_label(one, names.JOB), _index(one))
        if key[0] in found and (key not in pods or _born(pods[key]) <= _born(one)):
            pods[key] = one
    for (name, _), one in sorted(pods.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        found[name].pods.append(pod(one))
    return found


def pod(plain: Plain) -> Pod:
    """A pod from what the API server says."""
    status = plain.get("status") or {}
    conditions = {one.get("type"): one for one in status.get("conditions") or ()}
    containers = [c for c in status.get("containerStatuses") or () if c.get("name") == names.CONTAINER]
    state = containers[0].get("state") or {} if containers else {}
    ended = state.get("terminated") or {}
    words, text = _words(str(ended.get("message") or ""))
    disrupted = conditions.get("DisruptionTarget") or {}
    return Pod(
        name=plain["metadata"]["name"],
        index=_index(plain),
        phase=str(status.get("phase") or "Pending"),
        ending=bool(plain["metadata"].get("deletionTimestamp")),
        disrupted=str(disrupted.get("message") or disrupted.get("reason") or "")
        if disrupted.get("status") == "True"
        else "",
        waits=_waits(conditions, state),
        exit_code=ended.get("exitCode"),
        reason=str(ended.get("reason") or status.get("reason") or ""),
        started=str((state.get("running") or {}).get("startedAt") or ""),
        words=words,
        said=text,
    )


def _waits(conditions: Mapping[str | None, Plain], state: Plain) -> str:
    scheduled = conditions.get("PodScheduled") or {}
    if scheduled.get("status") == "False":
        return f"{scheduled.get('reason') or 'Unschedulable'}: {scheduled.get('message') or ''}".rstrip(": ")
    waiting = state.get("waiting") or {}
    if not waiting:
        return ""
    return f"{waiting.get('reason') or 'Waiting'}: {waiting.get('message') or ''}".rstrip(": ")


def _words(message: str) -> tuple[Mapping[str, Any], str]:
    line = message.strip().splitlines()[-1:] or [""]
    try:
        plain = json.loads(line[0])
    except ValueError:
        return {}, message[-_MOST:].strip()
    return (plain, "") if isinstance(plain, dict) else ({}, message[-_MOST:].strip())


def _label(plain: Plain, name: str) -> str:
    return str((plain["metadata"].get("labels") or {}).get(name, ""))


def _index(plain: Plain) -> int | None:
    meta = plain["metadata"]
    for source in (meta.get("annotations") or {}, meta.get("labels") or {}):
        value = source.get("batch.kubernetes.io/job-completion-index")
        if value is not None and str(value).isdigit():
            return int(value)
    return None


def _born(plain: Plain) -> str:
    return str(plain["metadata"].get("creationTimestamp") or "")
