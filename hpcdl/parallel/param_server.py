"""Parameter server: one process holds the weights and the optimizer; workers send gradients and fetch weights.

Source: Li et al., "Scaling Distributed Machine Learning with the Parameter Server", OSDI 2014; asynchronous:
Dean et al., "Large Scale Distributed Deep Networks" (Downpour SGD), NeurIPS 2012; bounded staleness: Ho et
al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", NeurIPS 2013.

The server lives in rank 0's process, answers over torch.distributed.rpc, and computes on the CPU. Every rank,
rank 0 too, is a worker with its own share of each global batch.

`mode=sync`: the server waits for all workers' gradients of a step and takes one optimizer step with their
mean; every worker gets the new weights. The same numbers as DDP.

`mode=async`: each gradient is applied when it comes. A step is still one global batch, and makes as many
updates as there are workers, each with 1/workers of the learning rate: with SGD (its momentum too) a
gradient moves the weights as far as in one synchronous step. The optimizer's averages reach back over as many
updates as `optim.betas` and `optim.momentum` say, so over fewer tokens than synchronously; asynchrony adds
momentum of its own (Mitliagkas et al., "Asynchrony begets Momentum", Allerton 2016), and AdamW with longer
ones was seen to learn much slower. Each gradient is clipped by itself; `grad_norm` is the root mean square of
the workers' norms.

A push's staleness is the number of updates that the server has made between this worker's fetch and its
push. `max_staleness` = s bounds it as Ho et al. do: a worker begins step c only when every worker has
finished step c - s - 1. Then no push is staler than (workers - 1)·(2s + 1), which the server checks. Mean and
maximum stand in metrics.jsonl and result.json as `staleness_mean` and `staleness_max`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

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


RPC_BYTES = 64 * 2**20
"""What TensorPipe takes in the server's process, as seen with two workers; in a worker's a quarter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(ParallelSpec):
    """The parameter server's workers fill `dp_replicate`."""

    mode: Literal["sync", "async"] = "sync"
    """One update a step with all gradients (`sync`), or one a gradient as it comes (`async`)."""
    max_staleness: Annotated[int, Ge(0)] = 2
    """`async`: steps by which a worker may be ahead of the slowest when it fetches weights."""
    rpc_timeout_s: Annotated[float, Gt(0)] = 600.0
    """How long a worker waits for the server, or the server for the slowest worker, before the run fails."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """Copies only."""
    yield from _copies.whole_models_only(config)


def traffic(config: Config, sizes: Sizes) -> Iterator[Sent]:
    """Gradients to the server and weights back; workers wait for one another's at its one link."""
    if sizes.dims.dp_replicate == 1:
        return
    yield Sent(
        what="gradients and weights",
        dimension="server",
        kind="serve",
        ranks=sizes.dims.dp_replicate,
        calls=1,
        size=2 * 4 * sizes.trained,
    )


def memory(config: Config, dims: ParallelDims, trained: Trained) -> tuple[Around, ...]:
    """The server's weights, state and snapshot on rank 0; what was pushed and fetched while it is on its way.

    A worker has no optimizer's state. Synchronous: the server holds the gradients of all workers (rank 0's own come
    as copies too), their mean and the next snapshot, and a worker gets weights while its gradients are there;
    asynchronous: each push by itself, one that waits for the lock, and the snapshots that are being fetched. In both
    TensorPipe has a copy of each message on its way: gradients in, weights out.
    """
    whole, others = 4 * trained.numbers, dims.dp_replicate - 1
    synchronous = config.mode == "sync"
    pushed = (others + 3 if synchronous else others + 2) * whole
    server = Around(ranks=1, weights=2 * whole, exchanging=pushed, beside=RPC_BYTES + 2 * others * whole)
    if not others:
        return (server,)
    got = whole if synchronous else 0.0
    return server, Around(ranks=others, optimizer=-trained.optimizer, exchanging=got, beside=RPC_BYTES / 4)


def build(config: Config, model: Any, grid: Grid, job: Job) -> Engine:
    """A worker on every rank, and on rank 0 the server."""
    from hpcdl.distributed.local import alone
    from hpcdl.distributed.server import ServerEngine

    return ServerEngine(
        alone(model, grid, job),
        grid,
        job,
        asynchronous=config.mode == "async",
        max_staleness=config.max_staleness,
        timeout_s=config.rpc_timeout_s,
    )
