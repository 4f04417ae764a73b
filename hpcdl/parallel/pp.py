"""Pipeline parallel: each rank holds some consecutive blocks; micro-batches pass from rank to rank.

Schedules: `gpipe` (Huang et al., "GPipe", NeurIPS 2019); `1f1b` (Narayanan et al., "PipeDream", SOSP 2019);
`interleaved_1f1b` (Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using
Megatron-LM", SC 2021); `interleaved_zb` and `zbv` (Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024,
and "Pipeline Parallelism with Controllable Memory", 2024); `dualpipev` (DeepSeek-AI, "DeepSeek-V3", 2024).
"""

from __future__ import annotations

from collections.abc import Iterator

from hpcdl.distributed import stages as layout
from hpcdl.errors import Fault
from hpcdl.parallel import _mesh
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.parallel import ParallelDims
from hpcdl.spec.traffic import Sent, Sizes

Config = _mesh.MeshConfig
check = _mesh.check
traffic = _mesh.traffic
build = _mesh.build
memory = _mesh.memory


def faults(config: _mesh.MeshConfig, dims: ParallelDims, spec: ExperimentSpec) -> Iterator[Fault]:
    """A block a stage at least, and enough micro-batches to fill the pipeline."""
    if dims.pp == 1:
        return
    schedule, wanted = layout.SCHEDULES[config.schedule], config.stages_per_rank
    usual = schedule.stages_per_rank
    if wanted not in (0, usual) and not (schedule.any_number and wanted > 1):
        yield Fault(
            key="parallel.stages_per_rank",
            value=str(wanted),
            problem=f"the schedule {config.schedule} wants {layout.wants(config.schedule)} on each rank",
            allowed=f"0, or {layout.wants(config.schedule)}",
            nearest=str(usual),
            fix=f"parallel.stages_per_rank={usual}",
        )
    else:
        yield from _too_few_blocks(config, dims, spec)
    if spec.trainer.compile and schedule.splits_backward:
        yield Fault(
            key="trainer.compile",
            value="true",
            problem=f"the schedule {config.schedule} computes the gradients of inputs and of weights apart,"
            " and a compiled block has one backward pass for both",
            allowed="trainer.compile=false, or a schedule with whole backward passes: gpipe, 1f1b, interleaved_1f1b",
            fix="trainer.compile=false",
        )
    size = spec.trainer.micro_batch_size * dims.data_ranks
    if spec.trainer.global_batch_size % size == 0:  # else a rule about the batch has something to say
        yield from _micro_batches_do_not_fit(config, dims, spec, spec.trainer.global_batch_size // size)


def sent(config: _mesh.MeshConfig, sizes: Sizes) -> Iterator[Sent]:
    """Hidden states at every cut, and their gradients back; once a step the gradient of an embedding torn apart."""
    dims = sizes.dims
    if dims.pp == 1:
        return
    stride = dims.world_size // dims.pp
    split = dims.tp if config.sequence_parallel else 1
    stages = layout.stages_per_rank(config.schedule, config.stages_per_rank)
    yield Sent(
        what="hidden states and their gradients",
        dimension="pp",
        kind="send",
        ranks=2,
        stride=stride,
        calls=(2 * stages - (dims.pp == 2)) * sizes.micro_batches,  # of two ranks each has one neighbour
        size=sizes.tokens * sizes.width * sizes.residual / split,
        behind="forward",
    )
    if sizes.tied:
        yield Sent(
            what="gradient of the tied embedding",
            dimension="pp",
            kind="send",
            ranks=2,
            stride=stride * (dims.pp - 1),
            calls=1,
            size=4 * sizes.tied,
        )


def _too_few_blocks(config: _mesh.MeshConfig, dims: ParallelDims, spec: ExperimentSpec) -> Iterator[Fault]:
    per_rank = layout.stages_per_rank(config.schedule, config.stages_per_rank)
    blocks = None if spec.model.shape is None else spec.model.shape.num_hidden_layers
    if blocks is None or blocks >= dims.pp * per_rank:
        return
    most = blocks // per_rank
    stages = f"{dims.pp} ranks × {per_rank} stages" if per_rank > 1 else f"{dims.pp} stages"
    # An interleaved schedule with fewer stages, or one without: the ranks themselves are not too many.
    simpler = per_rank > 1 and blocks >= dims.pp
    yield Fault(
        key="parallel.schedule" if simpler else "parallel.pp",
        value=config.schedule if simpler else str(dims.pp),
        problem=f"the model's {blocks} blocks are too few for {stages}, each with a block at least",
        allowed=f"parallel.pp of at most {most}"
        + (", or a schedule with one stage a rank" if simpler else ""),
        nearest="1f1b" if simpler else str(max(1, most)),
        fix="parallel.schedule=1f1b" if simpler else f"parallel.pp={max(1, most)}",
    )


def _micro_batches_do_not_fit(
    config: _mesh.MeshConfig, dims: ParallelDims, spec: ExperimentSpec, of_a_step: int
) -> Iterator[Fault]:
    """The micro-batches that go through the pipeline in one go.

    Args:
        config: with the schedule, and `microbatches`.
        dims: the degrees.
        spec: the experiment.
        of_a_step: micro-batches of a step on one copy of the pipeline.
    """
    at_once = config.microbatches or of_a_step
    reason = layout.does_not_fit(config.schedule, dims.pp, at_once)
    if of_a_step % at_once:
        reason = f"a step has {of_a_step} micro-batches, which can't go through the pipeline in rounds of {at_once}"
    if not reason:
        return
    fitting = [
        n
        for n in range(1, of_a_step + 1)
        if of_a_step % n == 0 and not layout.does_not_fit(config.schedule, dims.pp, n)
    ]
    if fitting:
        near = min(fitting, key=lambda n: abs(n - at_once))
        yield Fault(
            key="parallel.microbatches",
            value=str(config.microbatches),
            problem=reason,
            allowed=f"0 (all {of_a_step} of a step) or " * (of_a_step in fitting)
            + ", ".join(map(str, fitting)),
            nearest=str(near),
            fix=f"parallel.microbatches={near}",
        )
        return
    yield _batch_is_too_small(config, dims, spec, of_a_step, reason)


def _batch_is_too_small(
    config: _mesh.MeshConfig, dims: ParallelDims, spec: ExperimentSpec, of_a_step: int, reason: str
) -> Fault:
    trainer, rows = spec.trainer, spec.trainer.global_batch_size // dims.data_ranks
    smaller = [
        size
        for size in range(trainer.micro_batch_size - 1, 0, -1)
        if rows % size == 0 and not layout.does_not_fit(config.schedule, dims.pp, rows // size)
    ]
    enough = next(
        n
        for n in range(of_a_step + 1, of_a_step + 2 * dims.pp + 2)
        if not layout.does_not_fit(config.schedule, dims.pp, n)
    )
    larger = enough * trainer.micro_batch_size * dims.data_ranks
    fix = f"trainer.micro_batch_size={smaller[0]}" if smaller else f"trainer.global_batch_size={larger}"
    return Fault(
        key="trainer.global_batch_size",
        value=str(trainer.global_batch_size),
        problem=f"{reason}: {trainer.global_batch_size} sequences in micro-batches of {trainer.micro_batch_size}"
        f" on {dims.data_ranks} pipeline{'s' * (dims.data_ranks > 1)}",
        allowed=f"trainer.global_batch_size={larger}, a smaller trainer.micro_batch_size, or a smaller parallel.pp",
        fix=fix,
    )
