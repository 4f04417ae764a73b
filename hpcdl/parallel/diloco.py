"""DiLoCo: every process trains its own copy for many steps; then one outer step on how far they all went.

The outer step is SGD with Nesterov momentum on the pseudo-gradient, the outer weights minus the average of
the copies; then every copy begins anew from the outer weights and keeps its optimizer's state. Source:
Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023, algorithm 1.

With `sync_every=1 outer_lr=1 outer_momentum=0` it is local SGD that averages after every step. The last step
always is followed by an outer step. Evaluations and checkpoints between two outer steps are of the average of
the copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Interval

from hpcdl.errors import Fault
from hpcdl.parallel import _copies
from hpcdl.spec import ExperimentSpec, ParallelSpec
from hpcdl.spec.held import Around, Trained, averaging
from hpcdl.spec.parallel import ParallelDims
from hpcdl.spec.traffic import Sent, Sizes

if TYPE_CHECKING:
    from hpcdl.distributed.engine import Engine
    from hpcdl.distributed.mesh import Grid
    from hpcdl.distributed.parallelize import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(ParallelSpec):
    """DiLoCo fills `dp_replicate`; the inner optimizer is `optim`."""

    sync_every: Annotated[int, Ge(1)] = 50
    """Inner steps between two outer steps."""
    outer_lr: Annotated[float, Gt(0)] = 0.7
    """Learning rate of the outer SGD."""
    outer_momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """Its Nesterov momentum; 0 for none."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """Copies only."""
    yield from _copies.whole_models_only(config)


def traffic(config: Config, sizes: Sizes) -> Iterator[Sent]:
    """How far the copies went, now and then."""
    yield from _copies.average("progress", sizes.trained, config.sync_every, sizes)


def memory(config: Config, dims: ParallelDims, trained: Trained) -> tuple[Around, ...]:
    """The outer weights and their momentum; in the outer step their gradients, and Nesterov's of one tensor."""
    whole = 4 * trained.numbers
    momentum = whole if config.outer_momentum else 0.0
    step = whole + max(averaging(trained, _copies.BUCKET_BYTES), 4 * trained.largest)
    return (Around(ranks=dims.dp_replicate, weights=whole, optimizer=momentum, updating=step),)


def build(config: Config, model: Any, grid: Grid, job: Job) -> Engine:
    """Each rank's own copy, and the outer weights."""
    from hpcdl.distributed.local import DilocoEngine, alone

    return DilocoEngine(
        alone(model, grid, job),
        grid,
        job,
        sync_every=config.sync_every,
        outer_lr=config.outer_lr,
        outer_momentum=config.outer_momentum,
    )
