"""The order in which everything is put around a model: one function, read downward."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hpcdl.distributed import data_parallel
from hpcdl.distributed.decoder import Stage, blocks, inner
from hpcdl.distributed.engine import Engine, MakeOptimizer
from hpcdl.distributed.mesh import Grid
from hpcdl.distributed.parking import parking


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every strategy is told about the training besides its own config."""

    make_optimizer: MakeOptimizer
    autocast: bool
    """Passes run in bf16."""
    checkpointing: str
    """`none`, `full` or `selective`: which blocks recompute their activations."""
    offload: str
    """`none`, `host` or `disk`: where recomputing blocks' inputs wait."""
    compile: bool
    """Blocks are compiled."""
    micro_batches: int
    """Micro-batches of one rank and step."""
    micro_batch_size: int
    """Sequences of each."""
    seq_len: int
    """Tokens of a sequence."""
    seed: int
    max_steps: int
    """The last step."""


def parallelize(config: Any, model: Any, grid: Grid, job: Job) -> Engine:
    """A model that is whole on every rank → this rank's part of it, ready to be trained.

    Args:
        config: the strategy's MeshConfig.
        model: transformers' model, or peft's around it; taken apart in place.
        grid: the degrees and this rank's place.
        job: what the training asks for.
    """
    dims = grid.dims
    # 1. Pipeline: this rank keeps its blocks.
    stages: Sequence[Stage] = [Stage(model)]
    if dims.pp > 1:
        from hpcdl.distributed import pipeline

        stages = pipeline.split(config, model, grid, job)
    for stage in stages:
        # 2. Tensor parallel: this rank keeps its columns and rows of each matrix.
        if dims.tp > 1:
            from hpcdl.distributed import tensor

            tensor.shard(config, stage, grid)
        # 3. Context parallel: attention that sees the other ranks' part of the sequence.
        if dims.cp > 1:
            from hpcdl.distributed import context

            context.share(config, stage, grid)
        # 4. Recomputing and compiling act on what a block computes here: before the wrappers with hooks.
        checkpoint_activations(stage, job.checkpointing)
        stage.parking = parking(job.offload, grid.device)
        if job.compile:
            for block in blocks(stage):
                block.compile()
    # 5. Data parallel, outermost: what is left of each matrix is sharded or copied over the other ranks.
    wrapped = [data_parallel.wrap(config, stage, grid, bf16=job.autocast) for stage in stages]
    # 6. What drives it.
    if dims.pp > 1:
        return pipeline.PipelineEngine(config, wrapped, grid, job)
    if dims.cp > 1:
        return context.ContextEngine(config, wrapped, grid, job)
    return Engine(wrapped, grid, job.make_optimizer, autocast=job.autocast)


def checkpoint_activations(stage: Stage, how: str) -> None:
    """Has blocks recompute their activations in the backward pass: all (`full`), every second (`selective`).

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    if how == "none":
        return
    base: nn.Module = inner(stage.model)
    # Not reentrant: works with frozen inputs (LoRA) and with DDP; RNG is kept, so dropout is the same.
    with warnings.catch_warnings():
        # renamed in transformers 5.2x; the old name serves all of 5
        warnings.simplefilter("ignore", FutureWarning)
        enable: Any = base.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if how == "selective":
        for block in list(blocks(base))[1::2]:
            setattr(block, "gradient_checkpointing", False)  # noqa: B010
