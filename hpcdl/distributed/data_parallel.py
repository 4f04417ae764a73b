"""Data parallel: parameters copied (DDP) or sharded (FSDP2, HSDP) over the ranks that read other tokens."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from hpcdl.distributed.decoder import Stage, blocks
from hpcdl.distributed.mesh import Grid
from hpcdl.errors import HpcdlError


def wrap(config: Any, stage: Stage, grid: Grid, *, bf16: bool) -> nn.Module:
    """The stage under the wrapper that the degrees ask for.

    Context parallel ranks have other tokens of the same sequences: for gradients they are like ranks with
    other sequences, and share parameters like them.

    Args:
        config: the strategy's MeshConfig.
        stage: blocks, already split by tensor parallel where it is on.
        grid: the degrees and this rank's place.
        bf16: parameters travel and compute in bf16; gradients are added up in fp32.
    """
    dims = grid.dims
    # DDP's buckets take no parameters that are split already: FSDP with shards of 1 copies those.
    if dims.dp_shard > 1 or config.cpu_offload or (dims.tp > 1 and dims.gradient_ranks > 1):
        return fully_shard(config, stage, grid, bf16=bf16)
    stage.to(grid.device)
    # Pipelines add up their copies' gradients themselves: the reason is in hpcdl.distributed.pipeline.
    return replicate(config, stage, grid) if dims.gradient_ranks > 1 and dims.pp == 1 else stage


def replicate(config: Any, stage: Stage, grid: Grid) -> nn.Module:
    """DistributedDataParallel over all ranks that have other tokens.

    Nothing is broadcast: every rank has loaded the same weights (the worker checks it), and a causal
    language model's buffers are constants. DDP would send the frozen base of LoRA over the network too.
    """
    from torch.nn.parallel import DistributedDataParallel

    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers; 2.11 and 2.12 don't know the new name yet.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            stage,
            process_group=grid.gradient_group,
            bucket_cap_mb=config.bucket_cap_mb,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
            init_sync=False,
        )


def fully_shard(config: Any, stage: Stage, grid: Grid, *, bf16: bool) -> nn.Module:
    """FSDP2, a group a block: parameters are gathered when their block's turn comes, and let go after.

    With `dp_replicate` above 1 (HSDP) shards are copied, and gradients added up over the copies.

    Source: Zhao et al., "PyTorch FSDP", VLDB 2023; Rajbhandari et al., "ZeRO", SC 2020, stage 3.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
    from torch.distributed.fsdp import fully_shard as shard

    refuse_uneven(stage, grid.dims.dp_shard * grid.dims.cp)
    weights = grid.weights
    mesh = weights["dp_replicate", "fsdp"] if grid.dims.dp_replicate > 1 else weights["fsdp"]
    settings: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": config.reshard_after_forward}
    if bf16:
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if config.cpu_offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=grid.device.type == "cuda")
    for block in blocks(stage):
        shard(block, **settings)
    # The root's own parameters (embedding, norm, head) are needed again at once in the backward pass.
    shard(stage, **{**settings, "reshard_after_forward": False})
    return stage


def refuse_uneven(stage: nn.Module, ranks: int) -> None:
    """Quantized matrices can't be padded: each rank must get as many rows.

    Raises:
        HpcdlError: a matrix doesn't divide.
    """
    from torch.distributed.tensor import DTensor

    for name, parameter in stage.named_parameters():
        # a tensor made of tensors; what tensor parallel has split is one too
        quantized = hasattr(parameter, "__tensor_flatten__") and not isinstance(parameter, DTensor)
        if quantized and len(parameter) % ranks:
            raise HpcdlError(
                f"FSDP over {ranks} ranks (dp_shard × cp) can't share the {len(parameter)} rows of {name} "
                "evenly, as quantized weights must be: parallel=ddp, or another number of processes"
            )
