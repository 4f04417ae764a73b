"""`trainer.resume_from`: from what a user types to one checkpoint, and whether this run can go on from it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from hpcdl.errors import Fault, nearest_name
from hpcdl.spec import TrainerSpec
from hpcdl.spec.checkpoint import FOLDER, TRAINER, Found, newest, read

KEY = "trainer.resume_from"
ALLOWED = "a run id, its beginning, latest, a run's directory, or one of its checkpoints"


def resolve(trainer: TrainerSpec, runs_dir: Path) -> tuple[TrainerSpec, list[Fault]]:
    """The section with the checkpoint's absolute path.

    Args:
        trainer: as it was asked for.
        runs_dir: the folder of all runs, absolute.
    """
    if trainer.resume_from is None:
        return trainer, []
    place = _place(trainer.resume_from, runs_dir)
    found = _whole(trainer.resume_from, place) if isinstance(place, Path) else place
    if isinstance(found, Fault):
        return trainer, [found]
    return dataclasses.replace(trainer, resume_from=str(found.path)), []


def goes_on(trainer: TrainerSpec, seed: int) -> Iterator[Fault]:
    """The run gets the batches that the other one would have got, and has steps left to do."""
    found = read(Path(trainer.resume_from)) if trainer.resume_from is not None else None
    if found is None:
        return  # there is none, or `resolve` has said what is wrong with it
    if trainer.max_steps < found.step:
        yield Fault(
            key="trainer.max_steps",
            value=str(trainer.max_steps),
            problem=f"{found.path.name}, which trainer.resume_from names, has done {found.step} steps already",
            allowed=f"at least {found.step}: the steps of both runs together",
            nearest=str(found.step),
            fix=f"trainer.max_steps={2 * found.step}",
        )
    for key, theirs, ours in found.other_batches(seed, trainer.global_batch_size):
        yield Fault(
            key=key,
            value=str(ours),
            problem=f"the run that trainer.resume_from names has {theirs}: other batches would come next",
            allowed=str(theirs),
            nearest=str(theirs),
            fix=f"{key}={theirs}",
        )


def _place(given: str, runs_dir: Path) -> Path | Fault:
    """A run's directory, or a checkpoint's."""
    path = Path(os.path.abspath(os.path.expanduser(given)))  # noqa: PTH100, PTH111
    if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises where the name is too long to be one)
        return path.resolve()  # a link like runs/latest will be this very run's in a moment
    if os.sep in given:
        return _no_folder(given, path)
    if given == "latest":
        latest = (runs_dir / "latest").resolve()
        return latest if latest.is_dir() else _not_found(given, runs_dir, [])
    runs = sorted(path.parent for path in runs_dir.glob("[!.]*/*/spec.yaml"))
    exact = [run for run in runs if run.name == given] or [run for run in runs if run.parent.name == given]
    fitting = exact or [run for run in runs if given and run.name.startswith(given)]
    if len(fitting) == 1:
        return fitting[0]
    return _several(given, fitting) if fitting else _not_found(given, runs_dir, runs)


def _whole(given: str, place: Path) -> Found | Fault:
    """The checkpoint in a folder, or the newest whole one of a run."""
    if (place / TRAINER).exists() or place.name.startswith("step-"):
        found = read(place)
        near = newest(place.parent)[0]
    else:
        found = near = newest(place if place.name == FOLDER else place / FOLDER)[0]
    if found is not None:
        return found
    return Fault(
        key=KEY,
        value=given,
        problem=f"there is no whole checkpoint in {place}",
        allowed=ALLOWED,
        nearest=str(near.path) if near else "",
        fix=f"{KEY}={near.path}"
        if near
        else f"{KEY}=null, or let that run save one (trainer.checkpoint_every)",
    )


def _no_folder(given: str, path: Path) -> Fault:
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        beside = []
    near = nearest_name(path.name, beside)
    fix = f"{KEY}={path.parent / near}" if near else f"{KEY}=null"
    return Fault(
        key=KEY, value=given, problem="there is no such folder", allowed=ALLOWED, nearest=near, fix=fix
    )


def _not_found(given: str, runs_dir: Path, runs: list[Path]) -> Fault:
    near = nearest_name(given, {run.name for run in runs} | {run.parent.name for run in runs})
    return Fault(
        key=KEY,
        value=given,
        problem=f"no run in {runs_dir} is called so",
        allowed=ALLOWED,
        nearest=near,
        fix=f"{KEY}={near}" if near else f"{KEY}=null (hpcdl status lists the runs)",
    )


def _several(given: str, fitting: list[Path]) -> Fault:
    shown = ", ".join(run.name for run in fitting[:5]) + (", …" if len(fitting) > 5 else "")
    return Fault(
        key=KEY,
        value=given,
        problem=f"{len(fitting)} runs are called so, or begin so",
        allowed=shown,
        fix=f"{KEY}={fitting[-1].name}",
    )
