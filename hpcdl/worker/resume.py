"""Where a run goes on from: its own newest checkpoint, or another run's (`trainer.resume_from`)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hpcdl.errors import HpcdlError
from hpcdl.runs.store import RunDir
from hpcdl.spec.checkpoint import Found, Totals, name_of, newest, read
from hpcdl.worker.control import agree_on_start
from hpcdl.worker.process import Process


def choose(
    run: RunDir, who: Process, fingerprint: Tensor, device: torch.device, resume_from: str | None
) -> Found | None:
    """The checkpoint that all ranks go on from: rank 0 looks, the others take its word.

    The run's own newest one; where it has none yet, the one of another run that it is to continue.
    In the same collective it is checked that all ranks start from the same weights.

    Args:
        run: the run.
        who: this rank.
        fingerprint: of this rank's weights as loaded (`control.fingerprint`).
        device: where collectives take their tensors.
        resume_from: a checkpoint of another run, or None.

    Raises:
        HpcdlError: they don't, a node doesn't see the checkpoint, or `resume_from` is no whole one any more.
    """
    found = _look(run, resume_from) if who.is_first else None
    step = agree_on_start(found.step if found else -1, fingerprint, device)
    if step < 0 or who.is_first:
        return found
    path = run.checkpoints / name_of(step)
    # The run's own checkpoints are all of later steps than the one that it began from.
    other = read(Path(resume_from)) if resume_from is not None else None
    seen = other if other is not None and other.step == step else read(path)
    if seen is None:
        raise HpcdlError(
            f"{who.node} can't read {path if other is None else resume_from}, which rank 0 can:"
            " is the disk shared by all nodes?"
        )
    return seen


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


def _look(run: RunDir, resume_from: str | None) -> Found | None:
    own, torn = newest(run.checkpoints)
    for path in torn:
        run.event("warning", message=f"checkpoint {path.name} is not whole: passed over")
    if own is not None or resume_from is None:
        return own
    other = read(Path(resume_from))
    if other is None:
        raise HpcdlError(
            f"trainer.resume_from={resume_from} is no whole checkpoint any more: its run has gone on and"
            " kept later ones only (trainer.keep_last), or it was deleted; launch again with the run's id"
        )
    return other
