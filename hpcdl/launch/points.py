"""What a launch will do: which runs are new, which are taken up again, which are there already.

Only reads. `hpcdl.launch.submit` does it, and finds out then whether somebody else was quicker.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hpcdl.errors import UsageError
from hpcdl.experiment.resolve import absolute
from hpcdl.launch import auto, containers, frozen
from hpcdl.launch.base import Given, JobRequest
from hpcdl.launch.slurm import chunks, throttles
from hpcdl.launch.spec_text import SpecTexts
from hpcdl.launch.sweep import Point
from hpcdl.plan import nodes
from hpcdl.runs import foretold
from hpcdl.runs.parents import Parent
from hpcdl.runs.state import ACTIVE
from hpcdl.runs.store import RunDir
from hpcdl.spec import ClusterSpec, ExperimentSpec, LaunchOptions

if TYPE_CHECKING:
    from hpcdl.plan.records import Plan
    from hpcdl.runs.reconcile import View

Action = Literal["new", "resume", "active", "done"]
SLURMS_OWN = 1001
"""MaxArraySize where a site hasn't changed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One run, and what is to be done about it."""

    spec: ExperimentSpec
    run: RunDir
    labels: tuple[str, ...]
    """The points of the sweep that are this run."""
    action: Action
    view: View | None = None
    """The run as it stands; None for a new one."""
    notes: tuple[str, ...] = ()
    """How parallel=auto came to the strategy, a line each; empty where it was given."""
    plan: Plan | None = None
    """What it will take (hpcdl.launch.planning); None: nothing is launched, or it was planned before."""

    @property
    def attempt(self) -> int:
        """Which launch of this run it is, from 0."""
        return self.view.state.attempt + (self.action == "resume") if self.view else 0

    @property
    def recorded(self) -> dict[str, Any]:
        """For the event: what was planned, and what it was submitted in spite of (`force_fit=true`)."""
        if self.plan is None:
            return {}
        from hpcdl.plan import limits

        forced = {"force_fit": limits.against(self.plan)} if limits.verdict(self.plan) == "too big" else {}
        return {foretold.KEY: limits.figures(self.plan), **forced}

    @property
    def launches(self) -> bool:
        """Whether there is something to submit."""
        return self.action in ("new", "resume")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One submission that is to be made."""

    request: JobRequest
    runs: tuple[Planned, ...]
    """In the order of the array's tasks."""


def runs_folder(options: LaunchOptions) -> Path:
    """The folder of all runs, absolute."""
    return Path(absolute(options.runs_dir))


def plan(points: Sequence[Point], options: LaunchOptions) -> list[Planned]:
    """What is to be done about each run, each once, however many points of a sweep ask for it.

    Raises:
        UsageError: a run directory can't be read.
    """
    folder = runs_folder(options)
    wanted: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        wanted.setdefault((point.spec.name, point.run_id), []).append(point)
    tries = _tries(folder, {name for name, _ in wanted})
    found = {
        key: RunDir(folder / key[0] / _run_id(key[1], max(tries[key]))) for key in wanted if key in tries
    }
    views = _views(found.values(), check=not options.dry_run)
    planned = []
    for key, same in wanted.items():
        view = views.get(found[key].path) if key in found else None
        action = _action(view, force=options.force)
        number = max(tries.get(key, {0})) + 1 if action == "new" else 1
        run = RunDir(folder / key[0] / _run_id(key[1], number)) if action == "new" else found[key]
        labels = tuple(point.label for point in same)
        notes = next((auto.told(point.found) for point in same if point.found), [])
        planned.append(
            Planned(
                spec=same[0].spec,
                run=run,
                labels=labels,
                action=action,
                view=None if action == "new" else view,
                notes=tuple(notes),
            )
        )
    return planned


def _run_id(digest: str, number: int) -> str:
    """The run's folder: the experiment's digest, and which of its runs, from the second on."""
    return digest if number == 1 else f"{digest}-{number}"


def _tries(folder: Path, names: Iterable[str]) -> dict[tuple[str, str], set[int]]:
    """Numbers of the runs that each experiment (name, digest) has, in one look at each folder."""
    tries: dict[tuple[str, str], set[int]] = {}
    for name in names:
        try:
            entries = os.listdir(folder / name)  # noqa: PTH208 (one folder of a thousand runs)
        except OSError:
            continue
        for entry in entries:
            found = re.fullmatch(r"([0-9a-f]{12})(?:-(\d+))?", entry)
            if found and (folder / name / entry / "state.json").exists():
                tries.setdefault((name, found.group(1)), set()).add(int(found.group(2) or 1))
    return tries


def _views(runs: Iterable[RunDir], *, check: bool) -> dict[Path, View]:
    if not (runs := list(runs)):
        return {}  # mostly so: what asks the scheduler needn't be imported
    from hpcdl.runs.reconcile import read, reconcile

    reading = read(runs)
    if reading.faults:
        raise UsageError("\n".join(reading.faults))
    views = reading.views
    if check and any(view.state.state in ACTIVE for view in views):
        views = reconcile(views)
    return {view.run.path: view for view in views}


def _action(view: View | None, *, force: bool) -> Action:
    if view is None or force:
        return "new"
    if view.state.state in ACTIVE:
        return "active"
    return "done" if view.state.state == "COMPLETED" else "resume"


def batches(planned: Sequence[Planned], options: LaunchOptions, after: Sequence[Parent]) -> list[Batch]:
    """The submissions: one array for each resource shape, split where it is longer than the cluster allows."""
    shapes: list[tuple[ClusterSpec, list[Planned]]] = []
    for item in planned:
        for shape, members in shapes:
            if shape == item.spec.cluster:
                members.append(item)
                break
        else:
            shapes.append((item.spec.cluster, [item]))
    made = []
    for shape, members in shapes:
        arrays = chunks(members, _array_size(shape) if len(members) > 1 else 1)
        shares = throttles(shape.array_parallelism, len(arrays))
        for share, runs in zip(shares, arrays, strict=True):
            cluster = dataclasses.replace(shape, array_parallelism=share)
            made.append(Batch(request=request(runs, cluster, options, after), runs=runs))
    return made


def _array_size(cluster: ClusterSpec) -> int:
    """Tasks of one array at most."""
    if cluster.max_array_size is not None:
        return cluster.max_array_size
    said = nodes.max_array_size() if cluster.kind == "slurm" else None
    return max(1, said) if said is not None else SLURMS_OWN


def request(
    runs: Sequence[Planned], cluster: ClusterSpec, options: LaunchOptions, after: Sequence[Parent]
) -> JobRequest:
    """The submission of these runs.

    Its token follows from what it carries, so that a dry run prints the very text that would be submitted.
    """
    content = "\n".join(f"{item.run.path} {item.attempt}" for item in runs)
    names = {item.spec.name for item in runs}
    in_pods = cluster.kind == "kubernetes"  # whose image has a Python and an hpcdl of its own
    return JobRequest(
        token=hashlib.sha256(content.encode()).hexdigest()[:12],
        name=names.pop() if len(names) == 1 else "hpcdl-sweep",
        cluster=cluster,
        runs_dir=runs_folder(options),
        run_dirs=tuple(item.run.path for item in runs),
        python=cluster.python or ("python" if in_pods else sys.executable),
        parents=tuple(after),
        code=None if in_pods else frozen.folder_in(runs_folder(options)),
        specs=_given(runs) if in_pods else {},
        mounts=containers.mounts(cluster, runs_folder(options), (item.spec for item in runs), os.environ),
    )


def _given(runs: Sequence[Planned]) -> dict[Path, Given]:
    texts = SpecTexts()
    return {
        item.run.path: Given(text=texts.text(item.spec, item.notes), attempt=item.attempt) for item in runs
    }


def as_if_forced(
    planned: Sequence[Planned], made: Sequence[Batch], options: LaunchOptions, after: Sequence[Parent]
) -> tuple[list[Batch], list[str]]:
    """What a dry run shows: the submissions, or where all runs are there already, what force=true would send."""
    there = [item for item in planned if not item.launches]
    notes = [f"{item.run.path.name}: {note}" for item in planned for note in item.notes]
    notes += [
        f"{item.run.path.name} is {item.view.state.state}: launching would find it and submit nothing for it"
        for item in there
        if item.view is not None
    ]
    if made:
        return list(made), notes
    notes.append("what follows is what force=true would submit")
    return batches(there, options, after), notes
