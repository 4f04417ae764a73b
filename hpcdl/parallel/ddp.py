"""Distributed data parallel: every rank holds the whole model; gradients are averaged in buckets.

Source: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hpcdl.errors import Fault
from hpcdl.parallel import _mesh
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.traffic import Sent, Sizes


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


traffic = _mesh.traffic
build = _mesh.build
memory = _mesh.memory


def sent(config: _mesh.MeshConfig, sizes: Sizes) -> Iterator[Sent]:
    """Gradients once a step, in buckets, while the last micro-batch's backward pass goes on; a pipeline's after it."""
    dims, size = sizes.dims, 4 * sizes.trained
    if dims.gradient_ranks == 1 or _mesh.shards(config, dims) or not sizes.trained:
        return
    buckets = max(1.0, size / (config.bucket_cap_mb * 2**20))
    yield Sent(
        what="all-reduce of gradients",
        dimension="dp_replicate" if dims.cp == 1 else "dp_replicate × cp",
        kind="all_reduce",
        ranks=dims.gradient_ranks,
        stride=dims.tp,
        calls=buckets,
        size=size / buckets,
        behind="last backward" if dims.pp == 1 else "nothing",
    )
