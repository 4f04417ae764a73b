"""`trainer.resume_from`: from what a user types to one checkpoint, and whether this run can go on from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from hpcdl.errors import Fault
from hpcdl.experiment.places import run_folder
from hpcdl.spec import TrainerSpec
from hpcdl.spec.checkpoint import FOLDER, TRAINER, Damage, Found, look, newest, read

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
    place = run_folder(KEY, trainer.resume_from, runs_dir, ALLOWED)
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


def _whole(given: str, place: Path) -> Found | Fault:
    """The checkpoint in a folder, or the newest whole one of a run."""
    found: Found | Damage | None
    if (place / TRAINER).exists() or place.name.startswith("step-"):
        found = look(place)
        near = newest(place.parent)[0]
    else:
        found = near = newest(place if place.name == FOLDER else place / FOLDER)[0]
    if isinstance(found, Found):
        return found
    why = f": it is {found}" if found is not None and place.is_dir() else ""
    return Fault(
        key=KEY,
        value=given,
        problem=f"there is no whole checkpoint in {place}{why}",
        allowed=ALLOWED,
        nearest=str(near.path) if near else "",
        fix=f"{KEY}={near.path}"
        if near
        else f"{KEY}=null, or let that run save one (trainer.checkpoint_every)",
    )
