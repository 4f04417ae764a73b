"""How long a step will take, by roofline: computing, moving memory, sending, waiting, and Python's own.

Closed form, without torch: FLOPs and bytes of hpcdl.plan.time_work over the rates of a device (hpcdl.plan.devices),
messages that the strategies say (`traffic()` in hpcdl/parallel/) over its links (hpcdl.plan.time_links), a
pipeline's bubble by its schedule. Roofline: Williams, Waterman and Patterson, 2009. MFU: Chowdhery et al.,
"PaLM", 2022, appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hpcdl import compress, parallel, tasks
from hpcdl.compress import offload
from hpcdl.distributed import stages
from hpcdl.parallel._mesh import MeshConfig
from hpcdl.plan import time_links
from hpcdl.plan.records import Hardware, StepTime
from hpcdl.plan.time_constants import OPERATIONS, STEP_OPERATIONS, WRAPPED
from hpcdl.plan.time_pass import Pass
from hpcdl.plan.time_work import Work
from hpcdl.spec import ExperimentSpec, ModelShape
from hpcdl.spec.layout import matrices, parameters
from hpcdl.spec.parallel import ParallelDims
from hpcdl.spec.traffic import Behind, Sent

NUMBERS_BYTES = 64
"""What a rank tells the others after a step: loss, norm, memory, signals."""


def why_unknown(spec: ExperimentSpec) -> str | None:
    """Why no closed form of a step's time is known; None where one is."""
    if spec.model.shape is None:
        return "nobody has told the model's dimensions (model.shape)"
    task = tasks.get(spec.task.name)
    if not getattr(task, "PLANNED", True) or hasattr(task, "teacher_shape"):
        return f"task={spec.task.name} computes more than one model's loss"
    if offload.streams(spec):
        return f"offload={spec.offload.name} is as quick as its disk, of which nothing is known"
    if spec.parallel.name == "auto":
        return "parallel=auto has not been resolved"
    return None


def step(spec: ExperimentSpec, hardware: Hardware, world_size: int | None = None) -> StepTime | None:
    """Seconds of one optimizer step.

    Args:
        spec: the experiment, validated.
        hardware: what it runs on; of its nodes as many count as the ranks need.
        world_size: ranks, where they are others than the cluster section says.

    Returns:
        None where no closed form is known (`why_unknown` says why), the degrees don't make so many ranks, or the
        blocks not so many stages.
    """
    shape = spec.model.shape
    if shape is None or why_unknown(spec) is not None:
        return None
    dims = ParallelDims.possible(spec.parallel, world_size or spec.cluster.world_size)
    if dims is None or shape.num_hidden_layers < _stages(spec, dims):
        return None
    return _Step(spec, shape, hardware, dims).time()


def _stages(spec: ExperimentSpec, dims: ParallelDims) -> int:
    config = spec.parallel
    if dims.pp == 1 or not isinstance(config, MeshConfig):
        return 1
    return dims.pp * stages.stages_per_rank(config.schedule, config.stages_per_rank)


@dataclass(frozen=True)
class _Step:
    """One step, of the rank that has most to do."""

    spec: ExperimentSpec
    shape: ModelShape
    hardware: Hardware
    dims: ParallelDims

    def time(self) -> StepTime:
        work = Work(self.spec, self.shape, self.dims, self.hardware.device)
        ranks = [self._rank(work, blocks, rank) for rank, blocks in enumerate(work.stages)]
        forward, backward = max(ranks, key=lambda both: both[0].device_s + both[1].device_s)
        step = (forward + backward) * work.micro_batches
        messages = self._messages(work)
        budgets: dict[Behind, float] = {
            "forward": forward.device_s * work.micro_batches,
            "backward": backward.device_s * work.micro_batches,
            "last backward": backward.device_s,
        }
        traffic = time_links.priced(messages, self.hardware, budgets)
        exposed = sum(each.seconds - each.hidden for each in traffic)
        begun = sum(sent.calls for sent in messages if sent.ranks > 1) * time_links.HOP_OPERATIONS
        operations = step.operations + begun + STEP_OPERATIONS + OPERATIONS["tensor"] * work.tensors
        if any(sent.kind == "serve" for sent in messages):  # pickled, sent and unpickled, there and back
            operations += WRAPPED["rpc"] * work.tensors * max(1.0, self.dims.dp_replicate / 2)
        found = StepTime(
            compute_s=step.flops,
            memory_s=step.moved + work.from_host_s(step.device_s),
            communication_s=exposed,
            bubble_s=self._bubble(work, ranks),
            optimizer_s=work.optimizer_s + self._outer_s(work),
            overhead_s=self._overhead(operations, step.device_s + work.optimizer_s + exposed),
            tokens=self.spec.trainer.global_batch_size * self.spec.data.seq_len,
            mfu=None,
            traffic=traffic,
        )
        peak = self.hardware.device.peak_flops.get(self.spec.trainer.precision)
        if not peak:
            return found
        flops = model_flops(self.spec, self.shape) * found.tokens_per_s
        return replace(found, mfu=flops / (peak * self.dims.world_size))

    def _rank(self, work: Work, blocks: list[int], rank: int) -> tuple[Pass, Pass]:
        """Forward and backward passes of a micro-batch through all stages of a pipeline's rank."""
        count = sum(blocks)
        again = {"none": 0.0, "selective": (count + 1) // 2, "full": count}[
            self.spec.trainer.activation_checkpointing
        ]
        forward = work.forward * count
        backward = work.backward * count + work.again * again
        last = self.dims.pp - 1
        if isinstance(self.spec.parallel, MeshConfig) and self.dims.pp > 1:
            kind = stages.SCHEDULES[self.spec.parallel.schedule]
            last = stages.owner(kind.placement, self.dims.pp * len(blocks) - 1, self.dims.pp)
            scheduled = Pass(operations=WRAPPED["pp"] * len(blocks))
            forward, backward = forward + scheduled, backward + scheduled
        if rank == 0:
            forward += work.embedding
        if rank == last:
            forward += work.head
        return forward, backward

    # --- messages -----------------------------------------------------------------------------------------

    def _messages(self, work: Work) -> list[Sent]:
        found = list(parallel.get(self.spec.parallel.name).traffic(self.spec.parallel, work.sizes))
        world = self.dims.world_size
        if world > 1:
            calls = 1 + (self.dims.pp > 1 or work.shard > 1 or self.dims.tp > 1)
            found.append(
                Sent(
                    what="numbers of a step", dimension="world", kind="all_gather", ranks=world, calls=calls,
                    size=NUMBERS_BYTES * world,
                )
            )  # fmt: skip
        return found

    # --- the pipeline -------------------------------------------------------------------------------------

    def _bubble(self, work: Work, ranks: list[tuple[Pass, Pass]]) -> float:
        """Seconds in which the busiest rank waits for the others to fill and drain, by schedule.

        F, B and W: forward, gradients of inputs, gradients of weights; v stages a rank. GPipe and 1F1B: (p-1)(F+B+W);
        interleaved: over v (Narayanan et al., 2021, section 2.2); zero bubble, weights' gradients fill it (Qi et al.,
        2024, table 1): (p-1)(F+B-W)/v for interleaved_zb, (p-1)(F+B-2W)/v for zbv; DualPipeV, a DualPipe over 2p stages
        on p ranks (DeepSeek-V3's report, table 2, without its overlap): (p-1)(F+2B-W)/v.
        """
        config = self.spec.parallel
        if self.dims.pp == 1 or not isinstance(config, MeshConfig):
            return 0.0
        each = sorted(self._busy(forward + backward) for forward, backward in ranks)
        others = sum(each[:-1])  # (p-1)(F+B) where all are alike
        per_rank = len(work.stages[0])
        count = max(sum(blocks) for blocks in work.stages)
        backward = (self.dims.pp - 1) * work.backward.device_s * count
        weights = work.weights_share * backward
        bubble = {
            "gpipe": others,
            "1f1b": others,
            "interleaved_1f1b": others / per_rank,
            "interleaved_zb": max(0.0, others - 2 * weights) / per_rank,
            "zbv": max(0.0, others - 3 * weights) / per_rank,
            "dualpipev": max(0.0, others + backward - 3 * weights) / per_rank,
        }[config.schedule]
        rounds = work.micro_batches // config.microbatches if config.microbatches else 1
        # Ranks that share cores: one that waits leaves them to the others.
        share = self.hardware.device.share
        return (
            max(0.0, rounds * bubble - work.micro_batches * each[-1] * (1 - share))
            if share < 1
            else rounds * bubble
        )

    def _busy(self, share: Pass) -> float:
        """Seconds of a rank's device; on a CPU Python's own come before and after."""
        device = self.hardware.device
        started = share.operations * device.operation_s / device.share if device.kind == "cpu" else 0.0
        return share.device_s + started

    # --- beside the passes --------------------------------------------------------------------------------

    def _outer_s(self, work: Work) -> float:
        """Of what some strategies do with the weights besides."""
        config: Any = self.spec.parallel
        device, trained, copies = self.hardware.device, 4 * work.numbers[2], self.dims.dp_replicate
        moved = 0.0
        if hasattr(config, "outer_lr"):  # difference, momentum, step, copy back
            moved = 10 * trained / config.sync_every
        elif hasattr(
            config, "rpc_timeout_s"
        ):  # the server adds gradients up, steps, and copies weights for each answer
            updates = 1 if config.mode == "sync" else copies
            moved = copies * 5 * trained + (updates - 1) * 9 * trained
        elif hasattr(config, "sync_every"):
            moved = 4 * trained / config.sync_every
        return moved / (device.memory_bytes_per_s * device.share)

    def _overhead(self, operations: float, device_s: float) -> float:
        """Of starting operations: beside computing on a CPU; on a GPU only where it would otherwise wait for them."""
        device = self.hardware.device
        started = operations * device.operation_s / device.share
        if device.kind == "cpu":
            return started
        fixed = STEP_OPERATIONS * device.operation_s
        return max(fixed, started - device_s)


def model_flops(spec: ExperimentSpec, shape: ModelShape) -> float:
    """FLOPs of a token in training, recomputation left out: what MFU counts (as hpcdl.worker.metrics does)."""
    total = parameters(shape)
    trained = total
    if compress.freezes_base(spec):
        method = compress.get(spec.peft.name)
        trained = sum(method.memory(spec.peft, m).parameters * m.count for m in matrices(shape))
        total += trained
    return (
        4.0 * total + 2.0 * trained + 12.0 * shape.num_hidden_layers * shape.hidden_size * spec.data.seq_len
    )
