"""Fully sharded data parallel (FSDP2): parameters, gradients and optimizer state are split over all ranks.

Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", VLDB 2023;
Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from annotated_types import Ge

from hpcdl.distributed.stages import SCHEDULES
from hpcdl.parallel import _mesh
from hpcdl.spec.traffic import Behind, Sent, Sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(_mesh.MeshConfig):
    """FSDP fills `dp_shard`."""

    dp_replicate: Annotated[int, Ge(-1)] = 1
    """Copies of the model; above 1 this is HSDP."""
    dp_shard: Annotated[int, Ge(-1)] = -1
    """Ranks over which parameters are sharded; -1: whatever the other degrees leave."""


check = _mesh.check
traffic = _mesh.traffic
build = _mesh.build
memory = _mesh.memory


def sent(config: _mesh.MeshConfig, sizes: Sizes) -> Iterator[Sent]:
    """Each block's parameters before its forward pass, and again before its backward pass where they were let go.

    A pipeline adds gradients up whole and shares them out once, after the last backward pass
    (torch.distributed.pipelining); elsewhere each micro-batch's are shared out as they come.
    """
    dims, ranks = sizes.dims, sizes.dims.dp_shard * sizes.dims.cp
    if ranks == 1 or not _mesh.shards(config, dims):
        return
    dimension = "dp_shard" if dims.cp == 1 else "dp_shard × cp"
    message = partial(Sent, dimension=dimension, ranks=ranks, stride=dims.tp)
    block, ends = sizes.block_weights * sizes.block_bytes, sizes.end_weights * sizes.end_bytes
    forward, backward, whole = _gathers(config, sizes)
    behinds: tuple[tuple[Behind, float], ...] = (("forward", forward), ("backward", backward))
    for behind, times in behinds:
        if times:
            yield message(
                what=f"all-gather of parameters, {behind}",
                kind="all_gather",
                calls=sizes.blocks * times,
                size=block,
                behind=behind,
            )
    yield message(
        what="all-gather of embedding and head",
        kind="all_gather",
        calls=whole if ends else 0,
        size=ends,
        behind="forward",
    )
    calls = (sizes.blocks + 1) * (1 if dims.pp > 1 else sizes.micro_batches)
    yield message(
        what="reduce-scatter of gradients",
        kind="reduce_scatter",
        calls=calls,
        size=4 * sizes.trained / (sizes.blocks + 1),
        behind="backward" if dims.pp == 1 else "last backward",
    )


def _gathers(config: _mesh.MeshConfig, sizes: Sizes) -> tuple[float, float, float]:
    """How often a step gathers a block forward and backward, and what stands outside the blocks.

    In a pipeline nothing is let go after a backward pass but the last: the pass that comes after one, whichever way,
    finds its parameters there.
    """
    dims, times = sizes.dims, sizes.micro_batches
    if dims.pp == 1:
        return times, times if config.reshard_after_forward else 0, times
    if SCHEDULES[config.schedule].splits_backward or not config.reshard_after_forward:
        return 1, 0, 1
    first = times if config.schedule == "gpipe" else min(times, dims.pp)  # passes before the first one back
    return first, times + 1 - first, 1
