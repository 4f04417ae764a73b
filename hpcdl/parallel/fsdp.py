"""Fully sharded data parallel (FSDP2): parameters, gradients and optimizer state are split over all ranks.

Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", VLDB 2023;
Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from hpcdl.parallel import _mesh


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(_mesh.MeshConfig):
    """FSDP fills `dp_shard`."""

    dp_replicate: Annotated[int, Ge(-1)] = 1
    """Copies of the model; above 1 this is HSDP."""
    dp_shard: Annotated[int, Ge(-1)] = -1
    """Ranks over which parameters are sharded; -1: whatever the other degrees leave."""


check = _mesh.check
build = _mesh.build
