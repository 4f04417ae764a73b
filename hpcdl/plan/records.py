"""What a plan is made of: bytes of each rank, seconds of a step, and what the hardware is taken to be.

Plain values that a table, a plot, JSON, the search and the launcher read alike. Bytes and seconds everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

Moment = Literal["loading", "forward", "loss", "backward", "optimizer"]
"""When a rank holds most: while weights are read, at the forward pass's end, in the loss, in a block's backward pass,
or in the optimizer's step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """What the ranks of one pipeline stage hold; all ranks of a stage hold the same but for the batch's own spread."""

    stage: int
    """The pipeline rank, from 0; 0 without a pipeline."""
    ranks: int
    """How many ranks hold this."""
    bytes: dict[str, int]
    """hpcdl.plan.memory.CATEGORIES, each at its own highest."""
    at_peak: dict[str, int]
    """The same categories at the moment of the peak: they add up to `tensors`."""
    tensors: int
    """Bytes of tensors that are there at once, at most."""
    moment: Moment
    """When that is."""
    allocator: int
    """Reserved beyond tensors: rounding and fragments (a GPU's caching allocator), malloc's own on a CPU."""
    runtime: int
    """Of the process beside tensors: interpreter and libraries on a CPU; on a GPU the CUDA context, NCCL's and
    cuBLAS's own buffers there."""

    @property
    def peak(self) -> int:
        """What has to fit into the rank's share of the device's memory."""
        return self.tensors + self.allocator + self.runtime


def of_rank(memory: Sequence[RankMemory], rank: int) -> RankMemory:
    """What a rank holds: ranks are counted through the stages in order, since pipelines are outermost.

    Raises:
        ValueError: there are fewer ranks.
    """
    left = rank
    for stage in memory:
        if left < stage.ranks:
            return stage
        left -= stage.ranks
    raise ValueError(f"no rank {rank} among {sum(stage.ranks for stage in memory)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What one rank computes on. Rates are what is reached in practice, not the data sheet's."""

    name: str
    """`cpu`, or as the maker calls it: `H100 SXM`."""
    kind: Literal["cpu", "cuda"]
    """hpcdl trains on CPUs with gloo, on CUDA devices with NCCL."""
    memory_bytes: int | None
    """Of the device's memory what a rank may have; None: nobody has said."""
    peak_flops: dict[str, float]
    """By precision (fp32, bf16): the data sheet's dense rate, for MFU. On a CPU the measured one."""
    efficiency: dict[str, float]
    """By precision: the share of `peak_flops` that large matrix products reach; `attention`: of that what SDPA does."""
    memory_bytes_per_s: float
    """Bandwidth of the memory, as reached."""
    operation_s: float = 0.0
    """Of Python and torch for one operation: on a CPU beside its computing, on a GPU the host's to launch a kernel."""
    share: float = 1.0
    """Of all rates, what is left to a rank while its node's other ranks compute too: below 1 where ranks on CPUs
    are more than cores."""
    allocator: float = 1.0
    """Factor on what a plan has for the allocator, by finished runs."""
    beside_bytes: int = 0
    """On top of what a plan has for the process beside tensors, by finished runs; may be below 0."""

    def holding(self, ranks: Sequence[RankMemory]) -> tuple[RankMemory, ...]:
        """The plan of each stage on this device: hpcdl.plan.memory's with what finished runs have shown."""
        if self.allocator == 1 and not self.beside_bytes:
            return tuple(ranks)
        return tuple(
            replace(
                rank,
                allocator=math.ceil(self.allocator * rank.allocator),
                runtime=max(0, rank.runtime + self.beside_bytes),
            )
            for rank in ranks
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """What connects ranks."""

    inside_bytes_per_s: float
    """Between two ranks of a node, one direction, as reached in collectives."""
    between_bytes_per_s: float
    """Of one rank to another node, one direction: a node's network shared by its ranks."""
    inside_latency_s: float
    """Of one hop of a collective inside a node."""
    between_latency_s: float
    """Of one hop between nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a run is planned for."""

    device: Device
    """Each rank's."""
    links: Links
    """Between them."""
    ranks_per_node: int
    """Processes on a node."""
    nodes: int
    """Nodes."""
    sources: dict[str, str] = field(default_factory=dict)
    """Where each figure comes from, in words: a config key, `scontrol show node`, a table, a calibration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """One kind of communication of a step, as one rank sees it."""

    what: str
    """`all-reduce of gradients`, …"""
    dimension: str
    """The mesh's dimension, or the strategy's own word."""
    ranks: int
    """That take part."""
    calls: float
    """A step."""
    bytes: float
    """That a rank sends, a step."""
    seconds: float
    """If nothing else went on."""
    hidden: float
    """Of these seconds what passes behind computing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, by what they go to; they add up to `step_s`."""

    compute_s: float
    """Matrix products and attention, of the slowest stage; recomputation is in it."""
    memory_s: float
    """What moves memory: norms, casts, dequantization, activation offload."""
    communication_s: float
    """Not hidden behind computing."""
    bubble_s: float
    """A pipeline's idle time."""
    optimizer_s: float
    """The optimizer's step and clipping."""
    overhead_s: float
    """Of Python, kernel launches, the data loader and logging."""
    tokens: int
    """Of a step, over all ranks."""
    mfu: float | None
    """Model FLOPs utilization: 6·N·tokens and attention, over peak_flops (PaLM, appendix B); None without a peak."""
    traffic: tuple[Traffic, ...] = ()
    """All communication, hidden or not."""

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        parts = (self.compute_s, self.memory_s, self.communication_s, self.bubble_s, self.optimizer_s)
        return sum(parts) + self.overhead_s

    @property
    def tokens_per_s(self) -> float:
        """Over all ranks."""
        return self.tokens / self.step_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is known of a run before it is submitted."""

    memory: tuple[RankMemory, ...] | None
    """One for each pipeline stage; None: no closed form is known."""
    time: StepTime | None
    """None: no closed form is known."""
    unknown: tuple[str, ...]
    """Why a part is None, in words."""
    hardware: Hardware
    """What it was planned for."""
    world_size: int
    """Ranks."""
    max_steps: int
    """Optimizer steps."""
    checkpoint_bytes: int | None
    """Of one checkpoint, all ranks."""
    checkpoints: int
    """That lie on disk at once, at most."""
    run_s: float | None
    """Start, steps, evaluations and checkpoints together."""

    @property
    def peak(self) -> RankMemory | None:
        """The stage that holds most."""
        return max(self.memory, key=lambda rank: rank.peak) if self.memory else None

    @property
    def fits(self) -> bool | None:
        """Whether every rank fits; None where either number is unknown."""
        limit = self.hardware.device.memory_bytes
        return None if self.peak is None or limit is None else self.peak.peak <= limit
