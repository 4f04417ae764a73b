"""No pruning: every weight stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, PruneSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

CALIBRATED = False
REWEIGHTS = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(PruneSpec):
    """Nothing to configure."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """Fits everything."""
    return iter(())


def memory(config: Config, spec: ExperimentSpec) -> dict[str, int]:
    """Nothing."""
    return {}


def apply(config: Config, model: nn.Module, text: Sequence[Mapping[str, Tensor]] = ()) -> nn.Module:
    """The model as it is."""
    return model
