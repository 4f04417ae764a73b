"""Where metrics go besides metrics.jsonl, what is measured beside them, and what is looked at before and meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerSpec:
    """An experiment tracker; metrics.jsonl is always written."""

    name: Literal["none", "wandb", "tensorboard"] = "none"
    """Which tracker."""
    project: str = "hpcdl"
    """wandb's project."""
    entity: str | None = None
    """wandb's entity (team)."""
    mode: Literal["offline", "online"] = "offline"
    """wandb's mode; compute nodes mostly have no internet."""
    tags: tuple[str, ...] = ()
    """wandb's tags."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorSpec:
    """What each node writes to system-<node>.jsonl while the run goes on."""

    name: Literal["none", "default"] = "default"
    """`default`: every process of the run and every GPU, and what communication costs; `none`: nothing."""
    every_s: Annotated[float, Gt(0)] = 5.0
    """Seconds between samples."""
    pss_every_s: Annotated[float, Gt(0)] = 60.0
    """Seconds between looks at PSS, which cost the kernel about 10 ms a GiB of a process."""
    mb_per_day: Annotated[float, Gt(0)] = 15.0
    """MB of samples a day and node, after the first one: where they would be more, fewer are written down."""
    leaks: bool = True
    """Whether memory that grows without an end is told of (an event and a line in the log; nothing ends for it)."""
    leak_min_mib: Annotated[float, Gt(0)] = 1.0
    """MiB that a process must have grown by."""
    leak_look: bool = True
    """Whether a process that leaks looks which of its lines and tensors grow: up to 200 steps of tracing."""
    communication_steps: Annotated[int, Ge(0)] = 2
    """Steps of each try in which calls, bytes and seconds of collectives are measured; 0: none. They are left
    out of the average speed."""
    hang_factor: Annotated[float, Ge(0)] = 30.0
    """No step for this many times the try's median step is a hang: all ranks' stacks are written down, and the
    workers are ended; 0: never."""
    hang_min_s: Annotated[float, Gt(0)] = 300.0
    """But not before so many seconds."""
    hang_quiet_s: Annotated[float, Gt(0)] = 7200.0
    """Seconds without a sign that are a hang where no step has been timed yet, in an evaluation, in a
    checkpoint and at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightSpec:
    """What each node is looked at for before it trains; one that is not fit is left out and the job requeued."""

    name: Literal["none", "default"] = "default"
    """`none`: only that the run directory can be written."""
    disk_gb: Annotated[float, Gt(0)] | None = None
    """GiB that must be free on the run directory's disk; null: what a checkpoint of this experiment takes."""
    clock_s: Annotated[float, Gt(0)] = 60.0
    """Seconds that a node's clock may differ from the shared disk's."""
    allreduce_mib: Annotated[float, Ge(0)] = 4.0
    """MiB that the nodes send one another and add up before the first step, to tell the links' bandwidth;
    0: nothing."""
    min_mib_per_s: Annotated[float, Gt(0)] | None = None
    """A node whose link is slower is not fit; null: the slowest is only named."""
