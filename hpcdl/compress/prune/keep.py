"""Keeps a pruned model's zeros while it is trained: for a folder that `hpcdl prune`, or somebody else, has made.

Whatever is zero in the blocks' linear layers stays zero; nothing more is taken out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hpcdl.compress.prune import _common, none
from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, PruneSpec

CALIBRATED = False
REWEIGHTS = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(PruneSpec):
    """Nothing to configure: the zeros are there."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """What no method can do."""
    return _common.faults(_common.PatternConfig(name=config.name), spec)


memory, apply = none.memory, none.apply
