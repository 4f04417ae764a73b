"""Weights, gradients and optimizer state lie where the strategy puts them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, OffloadSpec

STREAMS = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(OffloadSpec):
    """Nothing to configure."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """Fits everything."""
    return iter(())


def memory(config: Config, spec: ExperimentSpec) -> dict[str, int] | None:
    """The strategy's own account holds."""
    return None
