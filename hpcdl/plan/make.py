"""A run's whole plan: memory, time, disk and duration put together."""

from __future__ import annotations

from hpcdl.plan import checkpoint, memory, time
from hpcdl.plan import hardware as hardware_of
from hpcdl.plan.records import Hardware, Plan, StepTime
from hpcdl.spec import ExperimentSpec

START_S = {"cpu": 12.0, "cuda": 20.0}
"""From the job's start to the first step, besides reading weights: torchrun and imports (10–20 s on 2 cores)."""
READ_BYTES_PER_S = 1e9
"""Of weights, from a disk that several nodes share."""
WRITE_BYTES_PER_S = 0.5e9
"""Of checkpoints, to such a disk."""
COPY_BYTES_PER_S = 4e9
"""Into host memory, while training waits, where checkpoints are written in the background."""
FORWARD_SHARE = 1 / 3
"""Of a step's computing what a forward pass takes: an evaluation does nothing else."""


def plan(spec: ExperimentSpec, hardware: Hardware | None = None) -> Plan:
    """All that is known of the run before it is submitted.

    Args:
        spec: the experiment, validated.
        hardware: what it is planned for; None: what its cluster section says, and Slurm.
    """
    hardware = hardware or hardware_of.of(spec)
    world = smallest_world(spec)
    ranks = memory.ranks(spec, hardware.device.kind, world)
    if ranks is not None:
        ranks = hardware.device.holding(ranks)
    step = time.step(spec, hardware)
    unknown = []
    if ranks is None:
        unknown.append(f"memory: {memory.why_unknown(spec) or 'no closed form is known'}")
    if step is None:
        unknown.append("time: no closed form is known for this model, strategy or task")
    size = checkpoint.checkpoint_bytes(spec)
    if size is None:
        unknown.append("disk: the size of a checkpoint isn't known")
    return Plan(
        memory=ranks,
        time=step,
        unknown=tuple(unknown),
        hardware=hardware,
        world_size=spec.cluster.world_size,
        max_steps=spec.trainer.max_steps,
        checkpoint_bytes=size,
        checkpoints=checkpoints(spec)[1],
        run_s=None if step is None else _run_s(spec, hardware, step, size or 0),
    )


def smallest_world(spec: ExperimentSpec) -> int:
    """Ranks of the smallest run that there may be: with nodes lost, fewer ranks share the same state."""
    cluster = spec.cluster
    return (cluster.min_nodes or cluster.nodes) * cluster.processes_per_node


def checkpoints(spec: ExperimentSpec) -> tuple[int, int]:
    """How many are written, and how many lie on disk at once, at most: a new one beside those that are kept."""
    trainer = spec.trainer
    every = trainer.checkpoint_every
    written = -(-trainer.max_steps // every) if every else 1
    return written, min(written, trainer.keep_last + trainer.keep_best + 1)


def _run_s(spec: ExperimentSpec, hardware: Hardware, step: StepTime, checkpoint_bytes: int) -> float:
    trainer = spec.trainer
    steps = trainer.max_steps * step.step_s
    evaluations = 2 + ((trainer.max_steps - 1) // trainer.eval_every if trainer.eval_every else 0)
    tokens = evaluations * trainer.eval_samples * spec.data.seq_len
    written, _ = checkpoints(spec)
    rate = COPY_BYTES_PER_S if trainer.checkpoint_async else WRITE_BYTES_PER_S
    saved = checkpoint_bytes * ((written - 1) / rate + 1 / WRITE_BYTES_PER_S)
    start = START_S[hardware.device.kind] + _weight_bytes(spec) / READ_BYTES_PER_S
    return start + steps + FORWARD_SHARE * tokens / step.tokens_per_s + saved


def _weight_bytes(spec: ExperimentSpec) -> int:
    """Of the model as it lies on disk, in 16 bits; weights that are drawn aren't read."""
    if spec.model.shape is None or spec.model.source == "random":
        return 0
    from hpcdl.spec.layout import matrices

    return 2 * sum(matrix.numel * matrix.count for matrix in matrices(spec.model.shape))
