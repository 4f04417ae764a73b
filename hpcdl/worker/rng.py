"""Random states of one rank: dropout after a resume draws what it would have drawn."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch


def seed_all(seed: int, rank: int, step: int = 0) -> None:
    """Seeds this rank; ranks draw different dropout masks."""
    value = (seed * 1_000_003 + step) * 65_537 + rank
    random.seed(value)
    torch.manual_seed(value)  # CUDA's generators too


def states() -> dict[str, Any]:
    """This rank's states: what `load` sets, once `torch.save` has written it."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load(path: Path) -> None:
    """Sets this rank's states to what `states` gave."""
    state = torch.load(path, weights_only=True)
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
