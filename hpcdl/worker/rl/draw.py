"""What is random in policy gradients: a function of numbers that don't depend on who computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESET, ACT, ORDER, PROBLEM, WRITE = range(5)
"""Purposes of training: each draws from a stream of its own."""
HELDOUT = 1 << 20
"""Added to a purpose: the same for evaluations."""


def stream(seed: int, purpose: int, *place: int) -> np.random.Generator:
    """Random numbers of one place: (iteration, sample, …); any other place has others."""
    return np.random.default_rng([seed, purpose, *place])


def number(seed: int, purpose: int, *place: int) -> int:
    """A seed for others' generators, 31 bits."""
    return int(stream(seed, purpose, *place).integers(2**31))


def permutation(seed: int, iteration: int, epoch: int, size: int) -> NDArray[np.int64]:
    """The order in which an iteration's samples are gone over in one of its epochs."""
    return stream(seed, ORDER, iteration, epoch).permutation(size)
