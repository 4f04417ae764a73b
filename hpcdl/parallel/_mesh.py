"""What the strategies on the device mesh share: their keys, rules about degrees, and how they are built.

`ddp`, `fsdp`, `hsdp`, `tp`, `pp` and `cp` are the same machine with other degrees set by default: any of
them takes other degrees besides its own, and so `parallel=fsdp parallel.tp=2` is FSDP with tensor parallel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, ParallelSpec
from hpcdl.spec.held import Around, Trained, averaging
from hpcdl.spec.parallel import ParallelDims
from hpcdl.spec.traffic import Sent, Sizes

if TYPE_CHECKING:
    from hpcdl.distributed.engine import Engine
    from hpcdl.distributed.mesh import Grid
    from hpcdl.distributed.parallelize import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig(ParallelSpec):
    """The keys of all dimensions of the mesh."""

    bucket_cap_mb: Annotated[int, Ge(1)] = 25
    """DDP: size of a gradient bucket, in MiB."""
    reshard_after_forward: bool = True
    """FSDP: let a block's parameters go after the forward pass (ZeRO-3), or keep them until the backward
    pass is over (ZeRO-2): more memory, less traffic. Pipelines with `interleaved_zb`, `zbv` and `dualpipev`
    always keep them, since they ask for them twice on the way back."""
    cpu_offload: bool = False
    """FSDP: keep shards, gradients and optimizer state in host memory."""
    sequence_parallel: bool = True
    """Tensor parallel: norms and residuals are split along the sequence too."""
    loss_parallel: bool = True
    """Tensor parallel: the vocabulary of the head and the loss is split too."""
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zb", "zbv", "dualpipev"] = "1f1b"
    """Pipeline: the order of forward and backward passes."""
    microbatches: Annotated[int, Ge(0)] = 0
    """Pipeline: micro-batches that are in the pipeline in one go; 0: all of a step's."""
    stages_per_rank: Annotated[int, Ge(0)] = 0
    """Pipeline: stages of each rank; 0: what the schedule needs (1, or 2 for the interleaved ones)."""
    cp_method: Literal["allgather", "ulysses"] = "allgather"
    """Context parallel: gather keys and values of the whole sequence, or swap sequence for heads."""


def check(config: MeshConfig, spec: ExperimentSpec) -> Iterator[Fault]:
    """Faults of every dimension that is in use."""
    from hpcdl.parallel import cp, pp, tp

    dims = ParallelDims.possible(spec.parallel, spec.cluster.world_size)
    if dims is None:
        return
    for part in (tp, cp, pp):
        yield from part.faults(config, dims, spec)


def traffic(config: MeshConfig, sizes: Sizes) -> Iterator[Sent]:
    """Of every dimension that is in use."""
    from hpcdl.parallel import cp, ddp, fsdp, hsdp, pp, tp

    for part in (tp, cp, pp, fsdp, hsdp, ddp):
        yield from part.sent(config, sizes)


def shards(config: MeshConfig, dims: ParallelDims) -> bool:
    """Whether FSDP wraps the blocks: under tensor parallel copies too (hpcdl.distributed.data_parallel)."""
    return dims.dp_shard > 1 or config.cpu_offload or (dims.tp > 1 and dims.gradient_ranks > 1)


def does_not_divide(name: str, degree: int, what: str, have: int, shown: str = "") -> Fault:
    """`have` of something can't be shared out evenly over a dimension's ranks."""
    divisors = [d for d in range(1, have + 1) if have % d == 0]
    near = min(divisors, key=lambda d: (abs(d - degree), d))
    return Fault(
        key=f"parallel.{name}",
        value=str(degree),
        problem=f"{shown}does not divide {what} {have}",
        allowed=f"divisors of {have}: {', '.join(map(str, divisors[:12]))}",
        nearest=str(near),
        fix=f"parallel.{name}={near}",
    )


def memory(config: MeshConfig, dims: ParallelDims, trained: Trained) -> tuple[Around, ...]:
    """DDP's buckets, or what a pipeline's copies average by themselves; FSDP keeps nothing between passes."""
    ranks = dims.world_size // dims.pp
    if shards(config, dims) or dims.gradient_ranks == 1:
        return (Around(ranks=ranks),)
    if dims.pp == 1:
        return (Around(ranks=ranks, bucketed=True),)
    return (Around(ranks=ranks, exchanging=averaging(trained, config.bucket_cap_mb * 2**20)),)


def build(config: MeshConfig, model: Any, grid: Grid, job: Job) -> Engine:
    """This rank's part of the model, as an engine that the training loop drives."""
    from hpcdl.distributed.parallelize import parallelize

    return parallelize(config, model, grid, job)
