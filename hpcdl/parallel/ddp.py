"""Distributed data parallel: every rank holds the whole model; gradients are averaged in buckets.

Source: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hpcdl.errors import Fault
from hpcdl.parallel import _mesh
from hpcdl.spec import ExperimentSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(_mesh.MeshConfig):
    """DDP fills `dp_replicate`."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """DDP copies parameters: it can't shard them."""
    if config.dp_shard != 1:
        yield Fault(
            key="parallel.dp_shard",
            value=str(config.dp_shard),
            problem="ddp copies parameters and can't shard them",
            allowed="1; parallel=fsdp shards them, parallel=hsdp does both",
            fix="parallel=hsdp",
        )
    yield from _mesh.check(config, spec)


build = _mesh.build
