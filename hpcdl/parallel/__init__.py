"""Parallel strategies: one file each, found by name; the core never branches on a strategy's name.

A strategy's file holds

- `Config`: a frozen dataclass below `ParallelSpec` with the strategy's own keys;
- `check(config, spec) -> Iterator[Fault]`: what it can't do, told before submission;
- `traffic(config, sizes) -> Iterator[Sent]`: what ranks send one another in a step;
- `build(config, model, grid, job) -> Engine`: the model under the strategy, on the worker.

These files are read on the login node too: torch, and hpcdl.distributed, are imported inside functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from hpcdl.byname import Folder
from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, ParallelSpec
from hpcdl.spec.held import Around, Trained
from hpcdl.spec.parallel import ParallelDims
from hpcdl.spec.traffic import Sent, Sizes

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

    def traffic(self, config: Any, sizes: Sizes) -> Iterator[Sent]:
        """What ranks send one another in a step, beside the numbers that the loop gathers."""
        ...

    def memory(self, config: Any, dims: ParallelDims, trained: Trained) -> tuple[Around, ...]:
        """What it holds on each rank beside the model, its gradients and the optimizer's state.

        Args:
            config: the strategy's.
            dims: the degrees.
            trained: what is trained on a rank; of shards the rank's own.

        Returns:
            One for each kind of rank of a pipeline stage, in the order of ranks; most have one kind.
        """
        ...

    def build(self, config: Any, model: Any, grid: Grid, job: Job) -> Engine:
        """The model under the strategy; `model` is whole, and taken apart in place."""
        ...


_folder: Folder[Strategy] = Folder(__name__, __path__)
names, get = _folder.names, _folder.get
