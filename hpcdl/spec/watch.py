"""Where metrics go besides metrics.jsonl, and what is measured beside them."""

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
    """`default`: CPU and memory of the run's processes, and what communication costs; `none`: nothing."""
    every_s: Annotated[float, Gt(0)] = 5.0
    """Seconds between samples."""
    communication_steps: Annotated[int, Ge(0)] = 2
    """Steps of each try in which calls, bytes and seconds of collectives are measured; 0: none. They are left
    out of the average speed."""
