"""Pretraining: the next token on all text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, TaskSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(TaskSpec):
    """Nothing to configure but the sample."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """Fits everything."""
    return iter(())
