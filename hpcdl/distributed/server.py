"""The parameter server, in rank 0's process, and the engine of its workers.

Sources: hpcdl/parallel/param_server.py. Tensors travel as CPU tensors: torch's RPC can carry CUDA's only
between processes that agree on a map of devices beforehand, and the server computes on the CPU anyway.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.distributed import rpc
from torch.futures import Future

from hpcdl.distributed import calls
from hpcdl.distributed.engine import (
    Batch,
    Engine,
    MakeOptimizer,
    Watch,
    clip,
    live_state,
    set_steps,
    squares,
    staleness_report,
    unwatched,
)
from hpcdl.distributed.local import root_mean_square
from hpcdl.distributed.mesh import Grid
from hpcdl.distributed.parallelize import Job
from hpcdl.errors import LostPeerError

STALENESS = "own.param_server.staleness"
"""Name in a checkpoint of the pushes' count, and the sum and maximum of their staleness."""


@dataclass(frozen=True, slots=True)
class Push:
    """One worker's gradients of one step."""

    worker: int
    gradients: list[Tensor | None]
    """CPU tensors in the order of the parameters; None for what took no part."""
    version: int
    """Of the weights that they were computed with."""
    learning_rate: float
    max_norm: float | None


@dataclass(frozen=True, slots=True)
class Weights:
    """The server's weights as they were at one moment."""

    version: int
    """Updates made before."""
    tensors: list[Tensor]


class Server:
    """The weights, their optimizer, and what is waited for. RPC's threads call it: a lock guards all of it."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        make_optimizer: MakeOptimizer,
        workers: int,
        *,
        asynchronous: bool,
        max_staleness: int,
    ) -> None:
        """Copies the parameters.

        Args:
            parameters: the trained ones as every worker has them at the beginning.
            make_optimizer: makes the optimizer over the server's own.
            workers: how many push.
            asynchronous: whether each push is an update.
            max_staleness: steps by which a worker may be ahead of the slowest when it fetches weights.
        """
        self.parameters = [nn.Parameter(p.detach().to("cpu", copy=True)) for p in parameters]
        self.optimizer = make_optimizer(self.parameters)
        self.version = 0
        self.staleness = torch.zeros(3, dtype=torch.float64)
        """Count, sum and maximum."""
        self.bound = (workers - 1) * (2 * max_staleness + 1) if asynchronous else 0
        self._workers = workers
        self._asynchronous = asynchronous
        self._max_staleness = max_staleness
        self._clocks = [0] * workers
        self._pushes: dict[int, tuple[Push, Future[Any]]] = {}
        self._fetches: list[tuple[int, Future[Weights]]] = []
        self._snapshot: Weights | None = None
        self.watch: Watch = unwatched
        """Around everything that makes tensors."""
        self._lock = threading.Lock()

    def fetch(self, worker: int) -> Future[Weights]:
        """The newest weights, once no worker is more than `max_staleness` steps behind this one."""
        answer: Future[Weights] = Future()
        with self._lock, self.watch(()):
            self._fetches.append((worker, answer))
            due = self._due()
        for future, weights in due:
            future.set_result(weights)
        return answer

    def push(self, push: Push) -> Future[tuple[float, Weights | None]]:
        """Makes an update of a worker's gradients: at once, or with all other workers' of the same step.

        Returns:
            The gradient's norm before clipping and, where synchronous, the weights after the update.
        """
        answer: Future[Any] = Future()
        due: list[tuple[Future[Any], Any]] = []
        with self._lock, self.watch([tensor for tensor in push.gradients if tensor is not None]):
            self._count(self.version - push.version)
            self._clocks[push.worker] += 1
            if self._asynchronous:
                norm = self._update(push.gradients, push.learning_rate / self._workers, push.max_norm)
                due = [(answer, (norm, None)), *self._due()]
            else:
                self._pushes[push.worker] = (push, answer)
                if len(self._pushes) == self._workers:
                    due = self._update_with_all()
        for future, value in due:  # outside of the lock: sends the answers
            future.set_result(value)
        return answer

    def missing(self) -> list[int]:
        """Workers whose gradients a step waits for."""
        with self._lock:
            return [] if not self._pushes else [w for w in range(self._workers) if w not in self._pushes]

    def weights(self) -> Weights:
        """A copy of the weights, shared by all who ask at the same version."""
        with self._lock:
            return self._weights()

    def _weights(self) -> Weights:
        if self._snapshot is None or self._snapshot.version != self.version:
            self._snapshot = Weights(self.version, [p.detach().clone() for p in self.parameters])
        return self._snapshot

    def copies(self) -> list[Tensor]:
        """The weights, and the copy of them that is kept."""
        with self._lock:
            kept = [] if self._snapshot is None else self._snapshot.tensors
            return [*self.parameters, *kept]

    def forget(self) -> None:
        """Lets the kept copy go: the weights have been set from outside."""
        with self._lock:
            self._snapshot = None

    def _due(self) -> list[tuple[Future[Any], Any]]:
        slowest = min(self._clocks)
        due = [f for f in self._fetches if self._clocks[f[0]] - slowest <= self._max_staleness]
        self._fetches = [f for f in self._fetches if f not in due]
        return [(future, self._weights()) for _, future in due]

    def _count(self, staleness: int) -> None:
        assert 0 <= staleness <= self.bound, f"a push is {staleness} updates late; {self.bound} at most"
        self.staleness[0] += 1
        self.staleness[1] += staleness
        self.staleness[2] = max(float(self.staleness[2]), staleness)

    def _update_with_all(self) -> list[tuple[Future[Any], Any]]:
        pushes = [self._pushes[worker][0] for worker in range(self._workers)]
        futures = [self._pushes[worker][1] for worker in range(self._workers)]
        self._pushes = {}
        gradients = [
            _mean(every, self._workers) for every in zip(*(p.gradients for p in pushes), strict=True)
        ]
        norm = self._update(gradients, pushes[0].learning_rate, pushes[0].max_norm)
        return [(future, (norm, self._weights())) for future in futures]

    def _update(self, gradients: Sequence[Tensor | None], rate: float, max_norm: float | None) -> float:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        norm = math.sqrt(math.fsum(squares(gradient) for gradient in gradients if gradient is not None))
        clip(self.parameters, norm, max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.version += 1
        return norm


def _mean(gradients: Sequence[Tensor | None], workers: int) -> Tensor | None:
    """In the order of the workers, so that it is the same to the last bit whoever came first."""
    given = [gradient for gradient in gradients if gradient is not None]
    if not given:
        return None
    total = given[0].clone()
    for gradient in given[1:]:
        total += gradient
    return total.div_(workers)


_server: Server | None = None
"""This process's server: rank 0's."""


def _here() -> Server:
    assert _server is not None, "only rank 0 has the server"
    return _server


# What is decorated runs in one of the server's RPC threads.
_deferred: Callable[[Any], Any] = rpc.functions.async_execution


@_deferred
def _fetch(worker: int) -> Future[Weights]:
    return _here().fetch(worker)


@_deferred
def _push(push: Push) -> Future[tuple[float, Weights | None]]:
    return _here().push(push)


class ServerEngine(Engine):
    """A worker of the parameter server; rank 0's process holds the server too."""

    def __init__(
        self,
        stage: nn.Module,
        grid: Grid,
        job: Job,
        *,
        asynchronous: bool,
        max_staleness: int,
        timeout_s: float,
    ) -> None:
        """Starts the server on rank 0, and joins all ranks for RPC.

        Args:
            stage: the whole model.
            grid: only `dp_replicate` may be above 1.
            job: what the training asks for.
            asynchronous: whether each worker's gradients are applied as they come.
            max_staleness: where they are, steps by which a worker may be ahead of the slowest.
            timeout_s: longest wait for an answer.

        Raises:
            LostPeerError: the ranks can't reach one another over RPC.
        """
        super().__init__([stage], grid, job.make_optimizer, autocast=job.autocast)
        self.lag = max_staleness if asynchronous else 0
        self._asynchronous = asynchronous
        self._timeout_s = timeout_s
        self._rank = grid.rank("dp_replicate")
        self._version = 0
        self._newest = True
        """Whether this worker has the newest weights that it can have: synchronous ones came with the answer."""
        self._begun = False
        self._server: Server | None = None
        workers = grid.dims.dp_replicate
        if self._rank == 0:
            global _server
            _server = self._server = Server(
                list(self.trainable.values()), job.make_optimizer, workers,
                asynchronous=asynchronous, max_staleness=max_staleness,
            )  # fmt: skip
        calls.join(self._rank, workers, timeout_s)

    # --- a step -------------------------------------------------------------------------------------------

    def accumulate(self, batches: Sequence[Batch], targets: int) -> Tensor:
        """As every engine's, with the server's weights."""
        if self._asynchronous or not self._newest:
            self._take(self._ask(_fetch, self._rank))
        return super().accumulate(batches, targets)

    def step(self, learning_rate: float, max_norm: float | None) -> float:
        """Sends the gradients.

        Returns:
            The norm before clipping: of the whole gradient, or where asynchronous of this worker's.
        """
        gradients = [None if p.grad is None else p.grad.cpu() for p in self.trainable.values()]
        push = Push(self._rank, gradients, self._version, learning_rate, max_norm)
        self._begun = True
        norm, weights = self._ask(_push, push)
        for parameter in self.trainable.values():
            parameter.grad = None
        if weights is not None:
            self._take(weights)
        return float(norm)

    def norm_of(self, norms: Tensor) -> float:
        """The whole gradient's, or the root mean square of the workers'."""
        return root_mean_square(norms) if self._asynchronous else float(norms[0])

    def _ask(self, what: Any, argument: Any) -> Any:
        # Weights come with one answer and gradients go with the other request; rank 0's own stay where they are.
        size = 0 if self._rank == 0 else sum(p.nbytes for p in self.trainable.values())
        both = what is _push and not self._asynchronous
        try:
            with record_function(f"hpcdl.comm:rpc:{2 * size if both else size}"):
                return rpc.rpc_async(calls.name(0), what, args=(argument,), timeout=self._timeout_s).wait()
        except RuntimeError as error:
            raise self._in_words(error) from error

    def _in_words(self, error: RuntimeError) -> LostPeerError:
        text = str(error).strip().splitlines()[0]
        missing = self._server.missing() if self._server is not None else []
        if "timeout" in text and missing:
            ranks = ", ".join(map(str, missing))
            return LostPeerError(
                f"no gradients from rank {ranks} for {self._timeout_s:g} s (parallel.rpc_timeout_s)"
            )
        return LostPeerError(f"rank {self._rank} got no answer from the parameter server on rank 0: {text}")

    def _take(self, weights: Weights) -> None:
        self._version = weights.version
        for parameter, value in zip(self.trainable.values(), weights.tensors, strict=True):
            parameter.detach().copy_(value)
        self._newest = True

    # --- evaluation and state -----------------------------------------------------------------------------

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """As every engine's, with the server's weights."""
        if self._asynchronous or not self._newest:
            self._take(self._ask(_fetch, self._rank))
        return super().evaluate(batches)

    def state(self) -> dict[str, Tensor]:
        """The server's, from rank 0; other ranks have nothing to add.

        After the first step a copy: a worker that has gone on may push while it is written.
        """
        found: dict[str, Tensor] = {}
        server = self._server
        if server is not None:
            found = self._of(server)
            if self._begun:
                found = {name: value.clone() for name, value in found.items()}
        dist.barrier()
        return found

    def _of(self, server: Server) -> dict[str, Tensor]:
        named = dict(zip(self.trainable, server.parameters, strict=True))
        return live_state(named, server.optimizer) | {STALENESS: server.staleness}

    def restored(self, step: int, keys: frozenset[str]) -> None:
        """The server's optimizer has made more steps where each push is one; workers are to fetch."""
        if self._server is not None:
            updates = self.grid.dims.dp_replicate if self._asynchronous else 1
            set_steps(self._server.optimizer, step * updates)
            self._server.forget()
        self._newest = False
        dist.barrier()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The server's, where it is; no worker has one."""
        return [] if self._server is None else [self._server.optimizer]

    def copies(self) -> list[Tensor]:
        """The server's."""
        return [] if self._server is None else self._server.copies()

    def watch(self, watching: Watch) -> None:
        """RPC's threads do the server's work."""
        if self._server is not None:
            self._server.watch = watching

    def report(self) -> dict[str, float]:
        """Mean and maximum of all pushes' staleness, in updates."""
        return {} if self._server is None else staleness_report(*self._server.staleness.tolist())

    def close(self) -> None:
        """Leaves the server's weights in rank 0's model, and ends RPC."""
        global _server
        if self._server is not None:
            self._take(self._server.weights())
        rpc.shutdown(graceful=True, timeout=math.ceil(self._timeout_s))
        _server = None
