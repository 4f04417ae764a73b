"""Hogwild!: the processes of one machine update one copy of the weights in shared memory, without locks.

Source: Niu et al., "Hogwild!: A Lock-Free Approach to Parallelizing Stochastic Gradient Descent", NeurIPS 2011.

Every process reads the weights while others write them, and adds its own update in place; an update that two
processes make to the same number at the same moment may be lost. A step is one global batch and makes as many
updates as there are processes, each of one process's share with 1/processes of the learning rate: with SGD
the sum of a step's updates is one synchronous step. The optimizer's state is each process's own, made of
its own gradients only. SGD's momentum buffers then add up to the synchronous one. AdamW's `betas` are taken
to the power of the number of processes, so that its averages reach back over as many updates of all processes
as they say: with longer ones it was seen to learn much slower. Each process clips its own gradient;
`grad_norm` is the root mean square of their norms. No two runs are the same to the last bit, by nature.

`max_staleness` = s is the number of steps by which the processes may run apart: step c begins only when every
process has finished step c - s - 1. An update's staleness, the number of other processes' updates since this
one began to compute its gradient, then is at most (processes - 1)·(2s + 1), which is checked; mean and
maximum stand in metrics.jsonl and result.json as `staleness_mean` and `staleness_max`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from hpcdl.errors import Fault
from hpcdl.parallel import _copies
from hpcdl.spec import ExperimentSpec, ParallelSpec
from hpcdl.spec.held import Around, Trained
from hpcdl.spec.parallel import ParallelDims
from hpcdl.spec.traffic import Sent, Sizes

if TYPE_CHECKING:
    from hpcdl.distributed.engine import Engine
    from hpcdl.distributed.mesh import Grid
    from hpcdl.distributed.parallelize import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(ParallelSpec):
    """Hogwild's processes fill `dp_replicate`."""

    max_staleness: Annotated[int, Ge(0)] = 2
    """Steps by which a process may be ahead of the slowest when it begins one."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """One machine's memory, and no GPUs."""
    yield from _copies.whole_models_only(config)
    cluster = spec.cluster
    if cluster.nodes > 1:
        yield Fault(
            key="cluster.nodes",
            value=str(cluster.nodes),
            problem="hogwild's processes share the memory of one machine",
            allowed="1; parallel=param_server parallel.mode=async goes over several",
            nearest="1",
            fix="cluster.nodes=1",
        )
    problem = "hogwild's weights are in the host's shared memory: it trains on the CPU"
    gpus = cluster.gpus_per_node
    if gpus:
        key, fix = "cluster.gpus_per_node", "cluster.gpus_per_node=0"
        yield Fault(key=key, value=str(gpus), problem=problem, allowed="0", nearest="0", fix=fix)
    elif (cluster.gres or "").startswith("gpu"):
        key, fix = "cluster.gres", "cluster.gres=null"
        yield Fault(key=key, value=str(cluster.gres), problem=problem, allowed="no GPUs", fix=fix)


def traffic(config: Config, sizes: Sizes) -> Iterator[Sent]:
    """Nothing: all have the same memory."""
    yield from ()


def memory(config: Config, dims: ParallelDims, trained: Trained) -> tuple[Around, ...]:
    """Nothing: weights are in memory that the processes share, and count in each; the optimizer's state is its own."""
    return (Around(ranks=dims.dp_replicate),)


def build(config: Config, model: Any, grid: Grid, job: Job) -> Engine:
    """The model with its weights in shared memory."""
    from hpcdl.distributed.hogwild import HogwildEngine
    from hpcdl.distributed.local import alone

    return HogwildEngine(alone(model, grid, job), grid, job, max_staleness=config.max_staleness)
