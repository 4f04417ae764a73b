"""No quantization: weights stay in the training precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, QuantSpec
from hpcdl.spec.layout import Held, Matrix

if TYPE_CHECKING:
    from torch import nn

NEEDS: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(QuantSpec):
    """Nothing to configure."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """Fits everything."""
    return iter(())


def memory(config: Config, matrix: Matrix, plain: int, compute: int) -> Held:
    """As it is."""
    return Held(bytes=plain * matrix.numel)


def apply(config: Config, model: nn.Module) -> nn.Module:
    """The model as it is."""
    return model
