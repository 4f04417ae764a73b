"""Local SGD: every process trains its own copy; every `sync_every` steps the copies are averaged.

Needs 1/sync_every of DDP's communication. Source: Stich, "Local SGD Converges Fast and Communicates Little",
ICLR 2019; McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data"
(FedAvg), AISTATS 2017.

A copy's gradient is that of its own share of the global batch, scaled so that with `sync_every=1` and an
optimizer that is linear in the gradient (SGD, with or without momentum) the average is DDP's step. Each copy
clips its own gradient; `grad_norm` is the root mean square of the copies' norms. The last step always
averages. Evaluations and checkpoints between two averages are of the averaged model; the copies go on from
where they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

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
    """Local SGD fills `dp_replicate`."""

    sync_every: Annotated[int, Ge(1)] = 8
    """Steps between two averages."""
    average_optimizer_state: bool = False
    """Average the optimizer's state too: twice more to send with AdamW, once more with SGD's momentum."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """Copies only."""
    yield from _copies.whole_models_only(config)


def traffic(config: Config, sizes: Sizes) -> Iterator[Sent]:
    """Weights, and where it is asked for the optimizer's state, now and then."""
    numbers = sizes.trained * (1 + (sizes.state if config.average_optimizer_state else 0))
    yield from _copies.average("weights", numbers, config.sync_every, sizes)


def memory(config: Config, dims: ParallelDims, trained: Trained) -> tuple[Around, ...]:
    """What is averaged at a time."""
    return (Around(ranks=dims.dp_replicate, updating=averaging(trained, _copies.BUCKET_BYTES)),)


def build(config: Config, model: Any, grid: Grid, job: Job) -> Engine:
    """Each rank's own copy."""
    from hpcdl.distributed.local import LocalEngine, alone

    return LocalEngine(
        alone(model, grid, job),
        grid,
        job,
        sync_every=config.sync_every,
        average_optimizer_state=config.average_optimizer_state,
    )
