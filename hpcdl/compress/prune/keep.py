"""Keeps a pruned model's zeros while it is trained: for a folder that `hpcdl prune`, or somebody else, has made.

Whatever is zero in the blocks' linear layers stays zero; nothing more is taken out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpcdl.compress.prune import _common
from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, PruneSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

CALIBRATED = False
REWEIGHTS = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(PruneSpec):
    """Nothing to configure: the zeros are there."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """What no method can do."""
    return _common.faults(_common.PatternConfig(name=config.name), spec)


def memory(config: Config, spec: ExperimentSpec) -> dict[str, int]:
    """Nothing: the zeros are the mask."""
    return {}


def apply(config: Config, model: nn.Module, text: Sequence[Mapping[str, Tensor]] = ()) -> nn.Module:
    """The model as it is."""
    return model
