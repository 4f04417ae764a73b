"""Where a run goes on from: its own newest checkpoint that is whole, or another run's (`trainer.resume_from`).

Lengths are looked at first, by rank 0, which costs nothing; what looks whole is then read to its last byte, a part of
its files by each rank, before anything is loaded. What is found goes to all ranks, so that all decide alike: on this
checkpoint, or on the one before it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hpcdl.errors import HpcdlError
from hpcdl.runs.store import RunDir
from hpcdl.spec.checkpoint import Damage, Found, Totals, check, folders, look, name_of
from hpcdl.worker.control import must_start_alike, word_of_first, words_of_all
from hpcdl.worker.keeping import Keeper
from hpcdl.worker.process import Process

PATIENCE_S = 10.0
"""How long another node may take to see what rank 0 sees: NFS keeps what it knows of a folder for some seconds."""
LOOK_EVERY_S = 0.25
Offer = tuple[Path, Damage | None]
"""A checkpoint, and what is wrong with it as far as lengths tell."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one rank says of a checkpoint."""

    node: str
    sees_it: bool
    """Whether all its files are there."""
    damage: Damage | None
    """What is wrong with this rank's share of them."""


def choose(
    run: RunDir, who: Process, keeper: Keeper, fingerprint: Tensor, device: torch.device, resume_from: str | None
) -> Found | None:  # fmt: skip
    """The checkpoint that all ranks go on from; None: from the beginning.

    The run's own newest one that is whole; where it has none, the one of another run that it is to continue. It is
    checked, too, that all ranks start from the same weights.

    Args:
        run: the run.
        who: this rank.
        keeper: of the run's checkpoints; it is told which of them are damaged.
        fingerprint: of this rank's weights as loaded (`control.fingerprint`).
        device: where collectives take their tensors.
        resume_from: a checkpoint of another run, or None.

    Raises:
        HpcdlError: ranks start from other weights, a node doesn't see the checkpoint, or `resume_from` is no whole
            one any more.
    """
    must_start_alike(fingerprint, device)
    keeper.token = word_of_first(keeper.token)
    damaged: list[str] = []
    chosen: Found | None = None
    if who.is_first:
        _tell_what_is_gone(run)
    for path, torn in _in_turn(_offers(run, resume_from) if who.is_first else None):
        found = torn or _verified(path, who)
        if isinstance(found, Found):
            chosen = found
            break
        if path.parent != run.checkpoints:
            raise HpcdlError(_gone(path, found))
        damaged.append(path.name)
        if who.is_first:
            message = f"checkpoint {path.name} is {found}: passed over"
            run.event("warning", message=message, checkpoint=path.name, file=found.file, damage=found.word)
    keeper.passed_over = frozenset(damaged)
    if chosen is None and damaged and who.is_first:
        run.event("warning", message="no checkpoint is whole: training begins anew")
    return chosen


def first_step(run: RunDir, found: Found | None) -> int:
    """The step that the run began from: above 0 where it continues another run."""
    if found is None:
        return 0
    return found.first_step if _is_own(run, found) else found.step


def totals_from(run: RunDir, found: Found | None) -> Totals:
    """The counts that the run goes on from; another run's time and memory are not this one's."""
    if found is None:
        return Totals()
    before = found.totals
    if _is_own(run, found):
        return before
    return Totals(step=before.step, tokens=before.tokens, tokens_before=before.tokens)


def _is_own(run: RunDir, found: Found) -> bool:
    return found.path.parent == run.checkpoints


def _tell_what_is_gone(run: RunDir) -> None:
    """The last one that was saved is always kept: where its folder isn't there, somebody has taken it away."""
    saved = [
        event["step"] for event in run.events() if event.get("event") == "checkpoint" and "step" in event
    ]
    if saved and not (run.checkpoints / name_of(saved[-1])).exists():
        name = name_of(saved[-1])
        message = f"checkpoint {name} was saved, and is not there any more: passed over"
        run.event("warning", message=message, checkpoint=name, damage="missing")


def _offers(run: RunDir, resume_from: str | None) -> Iterator[Offer]:
    """What may be gone on from, the best first."""
    paths = folders(run.checkpoints)
    if resume_from is not None:
        paths.append(Path(resume_from))
    for path in paths:
        found = look(path)
        yield path, found if isinstance(found, Damage) else None


def _in_turn(offers: Iterator[Offer] | None) -> Iterator[Offer]:
    """Rank 0's offers on all ranks, as long as they ask for them; other ranks give None."""
    while (offer := word_of_first(next(offers, None) if offers else None)) is not None:
        yield offer


def _verified(path: Path, who: Process) -> Found | Damage:
    """Reads all of a checkpoint, a part of its files on each rank; the same answer on all of them.

    Raises:
        HpcdlError: a node doesn't see it.
    """
    found = _seen_in_time(path)
    damage = None
    if isinstance(found, Found):
        problems = (check(path, name, found.files[name]) for name in _share(found, who))
        damage = next((problem for problem in problems if problem is not None), None)
    reports = words_of_all(Report(who.node, isinstance(found, Found), damage))
    blind = sorted({report.node for report in reports if not report.sees_it})
    if blind:
        raise HpcdlError(
            f"{', '.join(blind)} can't read {path}, which rank 0 can: is the disk shared by all nodes?"
        )
    return next((report.damage for report in reports if report.damage is not None), found)


def _seen_in_time(path: Path) -> Found | Damage:
    """What rank 0 has seen to be whole; on another node that may take a moment."""
    end = time.monotonic() + PATIENCE_S
    while isinstance(found := look(path), Damage) and time.monotonic() < end:
        time.sleep(LOOK_EVERY_S)
    return found


def _share(found: Found, who: Process) -> list[str]:
    """The files that a rank reads: about as many bytes as every other."""
    loads = [0] * who.world_size
    mine = []
    for name, file in sorted(found.files.items(), key=lambda item: (-item[1].size, item[0])):
        rank = loads.index(min(loads))
        loads[rank] += file.size
        if rank == who.rank:
            mine.append(name)
    return mine


def _gone(path: Path, damage: Damage) -> str:
    start = f"trainer.resume_from={path} is no whole checkpoint any more"
    if path.is_dir():
        return f"{start} ({damage}); `hpcdl checkpoints` of its run tells which are"
    return (
        f"{start}: its run has gone on and kept later ones only (trainer.keep_last), or it was deleted;"
        " launch again with the run's id"
    )
