"""What a strategy does to a rank's bytes, in plain numbers: said in hpcdl.parallel, added up in hpcdl.plan.memory."""

from __future__ import annotations

from dataclasses import dataclass

BUCKETS = 2
"""Buckets that hpcdl.distributed.collectives has under way at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What is trained on a rank, after the model was taken apart."""

    numbers: float
    """In fp32."""
    largest: float
    """Of the largest tensor."""
    optimizer: float
    """Bytes of the optimizer's state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What some ranks hold beside the model, its gradients and its optimizer's state."""

    ranks: int
    """How many ranks; the first ones come first."""
    weights: float = 0.0
    """Bytes of further copies of weights, all the time."""
    optimizer: float = 0.0
    """Bytes of further state; less than 0: the optimizer's own isn't here."""
    bucketed: bool = False
    """Gradients lie in buckets that are there all the time."""
    exchanging: float = 0.0
    """Bytes beside the gradients while they are exchanged."""
    beside: float = 0.0
    """Bytes of the process, no tensors: what the strategy's own way to talk takes."""
    updating: float = 0.0
    """Bytes once the gradients are gone: averages under way, outer gradients."""


def averaging(trained: Trained, bucket_bytes: float) -> float:
    """Bytes of what is averaged at a time (hpcdl.distributed.collectives.average)."""
    return min(4 * trained.numbers, BUCKETS * max(bucket_bytes, 4 * trained.largest))
