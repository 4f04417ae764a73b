"""What a pod knows of itself, and the run's directory on the volume, made from the ConfigMap where it isn't there.

The launcher may see the volume (its runs_dir is the same folder): then the directory is there, claimed and written
by it. If it doesn't, the first of the run's pods makes it, with the same content.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hpcdl.errors import SupersededError, UsageError
from hpcdl.launch import kube
from hpcdl.runs import private
from hpcdl.runs.files import write_atomic
from hpcdl.runs.state import RunState
from hpcdl.runs.store import RunDir, now

_NEW = ".new"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One pod of a run's Job."""

    run: str
    """`<name>/<run id>`."""
    token: str
    """The submission's."""
    index: int
    """The run's place in it."""
    attempt: int
    """Which launch of the run it is."""
    spec: str
    """The text of spec.yaml."""
    number: int
    """This pod's completion index: 0 is the one that owns the run's state."""
    count: int
    """Pods of the run."""
    group: str
    """What their host names begin with."""
    service: str
    """The headless service: their domain."""
    port: int
    """Of the rendezvous."""
    wait_s: float
    """How long other pods are waited for."""
    job: str
    """The Job's name."""
    uid: str
    """This very pod's, which no other one has had."""
    node: str
    """The machine's name."""
    runs: Path
    """Where the volume with the runs is."""

    @property
    def names(self) -> tuple[str, ...]:
        """Host names of all pods, the first one first."""
        return tuple(f"{self.group}-{number}" for number in range(self.count))

    @property
    def head(self) -> str:
        """The first pod, as the others reach it."""
        return f"{self.names[0]}.{self.service}"


def facts(environment: Mapping[str, str], spec_dir: Path = Path(kube.SPEC_DIR)) -> Facts:
    """This pod's.

    Raises:
        UsageError: it isn't one of `cluster=kubernetes`: a variable or a file is missing.
    """
    try:
        given = json.loads((spec_dir / kube.RUN_FILE).read_text(encoding="utf-8"))
        return Facts(
            run=str(given["run"]),
            token=str(given["token"]),
            index=int(given["index"]),
            attempt=int(given["attempt"]),
            spec=(spec_dir / kube.SPEC_FILE).read_text(encoding="utf-8"),
            number=int(environment[kube.INDEX]),
            count=int(environment[kube.COUNT]),
            group=environment[kube.GROUP],
            service=environment[kube.SERVICE],
            port=int(environment[kube.PORT]),
            wait_s=float(environment[kube.WAIT]),
            job=environment[kube.JOB],
            uid=environment[kube.UID],
            node=environment.get(kube.NODE, ""),
            runs=Path(environment[kube.RUNS]),
        )
    except (OSError, KeyError, ValueError) as error:
        raise UsageError(
            f"this is no pod of cluster=kubernetes: {type(error).__name__}: {error}\n"
            "fix: start it by hpcdl launch cluster=kubernetes; dry_run=true prints the whole Job"
        ) from error


def prepare(pod: Facts) -> RunDir:
    """The run's directory, there and this Job's own.

    Raises:
        SupersededError: the run has been launched again since.
        UsageError: the directory is somebody else's.
        OSError: the volume can't be written.
    """
    run = RunDir(pod.runs / pod.run)
    if not run.state_file.exists():
        _make(run, pod)
    private.require_mine(run.path)
    private.take_over(run.path)
    state = run.read_state()
    if state.submission != pod.token and pod.number == 0:
        _take_over(run, pod, state)
    return run


def is_ours(run: RunDir, pod: Facts, state: RunState) -> bool:
    """Whether the run is this Job's; another pod than the first waits until the first one has taken it over.

    Raises:
        SupersededError: it was, and has been launched again since.
    """
    if state.submission == pod.token:
        return True
    if _has_had(run, pod):
        raise SupersededError(f"{run.path} has been launched again since: {pod.job} has nothing to do")
    return False


def _make(run: RunDir, pod: Facts) -> None:
    """The directory whole, in one step: of several pods one is the quickest."""
    os.umask(private.MASKS["owner"])
    draft = RunDir(pod.runs / f"{_NEW}-{pod.uid}" / run.path.name)
    draft.path.mkdir(parents=True, exist_ok=True)
    write_atomic(draft.spec_file, pod.spec)
    draft.write_state(_first_state(run, pod))
    draft.event("submitted", attempt=pod.attempt, submission=pod.token, by="pod")
    run.path.parent.mkdir(parents=True, exist_ok=True)
    try:
        draft.path.rename(run.path)
    except OSError:
        if not run.state_file.exists():
            raise
    finally:
        shutil.rmtree(draft.path.parent, ignore_errors=True)


def _first_state(run: RunDir, pod: Facts) -> RunState:
    plain: dict[str, Any] = yaml.load(pod.spec, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    cluster = plain["cluster"]
    return RunState(
        run_id=run.path.name,
        name=str(plain["name"]),
        state="PENDING",
        kind="kubernetes",
        job_id=pod.job,
        submission=pod.token,
        array_index=pod.index,
        attempt=pod.attempt,
        nodes=cluster["nodes"],
        world_size=cluster["nodes"] * cluster["processes_per_node"],
        max_steps=plain["trainer"]["max_steps"],
        created=now(),
    )


def _take_over(run: RunDir, pod: Facts, state: RunState) -> None:
    """An earlier launch's directory, which this launcher couldn't see: it goes on from there."""
    is_ours(run, pod, state)
    if state.state == "COMPLETED":
        return
    changes: dict[str, Any] = {
        "state": "PENDING",
        "reason": "",
        "kind": "kubernetes",
        "job_id": pod.job,
        "submission": pod.token,
        "array_index": pod.index,
        "attempt": max(pod.attempt, state.attempt + 1),
        "node_list": (),
        "exit_code": None,
        "ended": None,
    }
    event = ("submitted", {"attempt": changes["attempt"], "submission": pod.token, "by": "pod"})
    run.update(expect=state, event=event, **changes)
    write_atomic(run.spec_file, pod.spec)
    run.stop_file.unlink(missing_ok=True)


def _has_had(run: RunDir, pod: Facts) -> bool:
    return any(e.get("event") == "submitted" and e.get("submission") == pod.token for e in run.events())
