"""Parallel strategies: one file each, found by name; the core never branches on a strategy's name.

A strategy's file holds

- `Config`: a frozen dataclass below `ParallelSpec` with the strategy's own keys;
- `check(config, spec) -> Iterator[Fault]`: what it can't do, told before submission;
- `build(config, model, grid, job) -> Engine`: the model under the strategy, on the worker.

These files are read on the login node too: torch, and hpcdl.distributed, are imported inside functions.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, ParallelSpec

if TYPE_CHECKING:
    from hpcdl.distributed.engine import Engine
    from hpcdl.distributed.mesh import Grid
    from hpcdl.distributed.parallelize import Job


class Strategy(Protocol):
    """What a strategy's module offers."""

    Config: type[ParallelSpec]

    def check(self, config: Any, spec: ExperimentSpec) -> Iterator[Fault]:
        """Faults of this strategy with this experiment."""
        ...

    def build(self, config: Any, model: Any, grid: Grid, job: Job) -> Engine:
        """The model under the strategy; `model` is whole, and taken apart in place."""
        ...


@cache
def names() -> tuple[str, ...]:
    """Names of all strategies: the files of this folder."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def get(name: str) -> Strategy:
    """The strategy called `name`.

    Raises:
        KeyError: there is no such file.
    """
    if name not in names():
        raise KeyError(name)
    return cast(Strategy, importlib.import_module(f"{__name__}.{name}"))
