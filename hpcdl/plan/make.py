"""A run's whole plan: memory, time, disk and duration put together."""

from __future__ import annotations

from dataclasses import dataclass

from hpcdl.plan import checkpoint, memory, time
from hpcdl.plan import hardware as hardware_of
from hpcdl.plan.records import Hardware, Plan, RankMemory, StepTime
from hpcdl.spec import ExperimentSpec

START_S = {"cpu": 12.0, "cuda": 20.0}
"""From the job's start to the first step, besides reading weights: torchrun and imports (10–20 s on 2 cores)."""
READ_BYTES_PER_S = 1e9
"""Of weights, from a disk that several nodes share."""
WRITE_BYTES_PER_S = 0.5e9
"""Of checkpoints, to such a disk."""
COPY_BYTES_PER_S = 4e9
"""Into host memory, while training waits, where checkpoints are written in the background."""
COUNTS = (
    "max_steps",
    "eval_every",
    "eval_samples",
    "log_every",
    "checkpoint_every",
    "keep_last",
    "keep_best",
)
"""Of the trainer's keys those that no step's memory or time hangs on."""
FORWARD_SHARE = 1 / 3
"""Of a step's computing what a forward pass takes: an evaluation does nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step takes: all that doesn't hang on how many there are."""

    memory: tuple[RankMemory, ...] | None
    """One for each pipeline stage; None: no closed form is known."""
    time: StepTime | None
    """None: no closed form is known."""
    unknown: tuple[str, ...]
    """Why a part is None, in words."""
    checkpoint_bytes: int | None
    """Of one checkpoint."""


def plan(spec: ExperimentSpec, hardware: Hardware | None = None) -> Plan:
    """All that is known of the run before it is submitted.

    Args:
        spec: the experiment, validated.
        hardware: what it is planned for; None: what its cluster section says, and Slurm.
    """
    hardware = hardware or hardware_of.of(spec)
    return whole(spec, hardware, step(spec, hardware))


def step(spec: ExperimentSpec, hardware: Hardware) -> Step:
    """One step's memory and time; neither hangs on the trainer's COUNTS."""
    ranks = memory.ranks(spec, hardware.device.kind, smallest_world(spec))
    if ranks is not None:
        ranks = hardware.device.holding(ranks)
    took = time.step(spec, hardware)
    unknown = []
    if ranks is None:
        unknown.append(f"memory: {memory.why_unknown(spec) or 'no closed form is known'}")
    if took is None:
        unknown.append("time: no closed form is known for this model, strategy or task")
    size = checkpoint.checkpoint_bytes(spec)
    if size is None:
        unknown.append("disk: the size of a checkpoint isn't known")
    return Step(memory=ranks, time=took, unknown=tuple(unknown), checkpoint_bytes=size)


def whole(spec: ExperimentSpec, hardware: Hardware, one: Step) -> Plan:
    """The run's plan, given what a step takes."""
    return Plan(
        memory=one.memory,
        time=one.time,
        unknown=one.unknown,
        hardware=hardware,
        world_size=spec.cluster.world_size,
        max_steps=spec.trainer.max_steps,
        checkpoint_bytes=one.checkpoint_bytes,
        checkpoints=checkpoints(spec)[1],
        run_s=None if one.time is None else _run_s(spec, hardware, one.time, one.checkpoint_bytes or 0),
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
