"""No fine-tuning method: every parameter is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, PeftSpec
from hpcdl.spec.layout import Beside, Matrix

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(PeftSpec):
    """Nothing to configure."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """Fits everything."""
    return iter(())


def memory(config: Config, matrix: Matrix) -> Beside:
    """Nothing beside any matrix."""
    return Beside()


def apply(config: Config, model: nn.Module) -> nn.Module:
    """The model as it is."""
    return model
