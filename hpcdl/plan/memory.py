"""Where the bytes of a training step will go on the ranks of each pipeline stage, in closed form.

Each method says its own part (`memory()` beside its `apply()` or `build()`: hpcdl.compress, hpcdl.compress.quant,
hpcdl.parallel); here they are put together with what the decoder and the loop need. `tensors` are those that the
worker counts (hpcdl.worker.storages): a block's passes are played on a tape once (hpcdl.plan.tape, block) and
multiplied by the number of blocks (hpcdl.plan.stage). What lies beside them is in hpcdl.plan.beside.

Recomputation: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; the form of the sum: Korthikanti et
al., "Reducing Activation Recomputation", 2022, section 4.
"""

from __future__ import annotations

from typing import Any

from hpcdl import tasks
from hpcdl.compress import offload
from hpcdl.plan import beside
from hpcdl.plan.decoder import Decoder
from hpcdl.plan.loss import CHUNK_LOGITS, HELD_WEIGHTS
from hpcdl.plan.records import RankMemory
from hpcdl.plan.shares import RUNTIME_BYTES, STATE_BYTES, of_stages
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.parallel import ParallelDims

CATEGORIES = {
    "weights": "the model's own, as they are held, and further copies of them",
    "adapters": "trained beside a frozen base",
    "gradients": "of what is trained",
    "optimizer": "its state",
    "activations": "kept from the forward pass for the backward pass",
    "recomputed": "a block's, computed again (activation checkpointing)",
    "logits": "of a chunk of tokens, and the loss's own gradients",
    "buffers": "weights made whole, cast or gathered while they are used",
    "temporary": "what passes from one operation to the next, or from rank to rank",
}
"""What is planned and measured, and what it means."""


def ranks(
    spec: ExperimentSpec, device: str = "cpu", world_size: int | None = None
) -> tuple[RankMemory, ...] | None:
    """What the ranks of each pipeline stage hold; None where no closed form is known (`why_unknown` says why).

    Args:
        spec: the experiment, validated.
        device: `cpu` or `cuda`.
        world_size: ranks, where they are others than the cluster section says.
    """
    if why_unknown(spec) is not None:
        return None
    world = world_size or spec.cluster.world_size
    streamed = offload.get(spec.offload.name).memory(spec.offload, spec)
    if streamed is not None:
        return (_of_a_way(streamed, device, world),)
    shape = spec.model.shape
    dims = ParallelDims.possible(spec.parallel, world)
    assert shape is not None
    if dims is None:
        return None
    return of_stages(Decoder(spec=spec, shape=shape, device=device, dims=dims))


def why_unknown(spec: ExperimentSpec) -> str | None:
    """Why no closed form is known, in words; None where one is."""
    if not getattr(tasks.get(spec.task.name), "PLANNED", True):
        own: Any = getattr(tasks.get(spec.task.name), "why_unplanned", None)
        return (
            str(own(spec))
            if own
            else f"task={spec.task.name} computes more than one model's passes over text"
        )
    if spec.model.shape is None:
        return f"the dimensions of {spec.model.name} stand with its weights only: say them in model.shape"
    shape_of: Any = getattr(tasks.get(spec.task.name), "teacher_shape", None)
    if shape_of is not None and shape_of(spec.task) is None:
        return f"the dimensions of task={spec.task.name}'s teacher aren't known here, before its weights are opened"
    if spec.optim.name not in STATE_BYTES:
        return f"the state of optim={spec.optim.name} is not known"
    if spec.parallel.name == "auto":
        return "parallel=auto has not been resolved"
    return None


def _of_a_way(streamed: dict[str, int], device: str, world: int) -> RankMemory:
    """What a way of offloading says of itself adds up to the peak."""
    found = {name: streamed.get(name, 0) for name in CATEGORIES}
    return RankMemory(
        stage=0, ranks=world, bytes=found, at_peak=found, tensors=sum(found.values()), moment="backward",
        allocator=0, runtime=streamed.get("process", RUNTIME_BYTES) if device == "cpu" else beside.context(False),
    )  # fmt: skip


__all__ = [
    "CATEGORIES",
    "CHUNK_LOGITS",
    "HELD_WEIGHTS",
    "RUNTIME_BYTES",
    "STATE_BYTES",
    "ranks",
    "why_unknown",
]
