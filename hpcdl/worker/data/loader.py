"""The micro-batches of coming steps, built ahead of time by processes of their own (`data.workers`).

torch's DataLoader does the work; what is here says which rows, in which order. A position in the data is
(seed, epoch, global sample index), so what a step reads depends on the step alone: any number of workers, and
a run resumed at any step on any number of ranks, give the very same batches.

hpcdl's rows are tokens already, memory-mapped: the four micro-batches of a step, 4 × 2,048 tokens each, take 1 ms
to build, and 8 to 18 ms to come through from a worker (2 busy cores; benchmarks/data_workers.py). So
`data.workers` is 0 by default; a worker pays where a row is slow to read, on a cold or remote disk.

Workers are forked: ready after 0.05 s, with 10 MB of their own; a clean start (forkserver, spawn) takes 1.3 to
1.7 s and 145 MB for importing torch, on every rank. What makes forking beside gloo's, CUDA's and OpenMP's
threads safe here: a worker only reads memory-mapped rows and calls numpy; torch gives it one thread, so that
OpenMP's pool, whose threads don't exist in it, is never asked; it never touches CUDA or a process group; it
dies with its rank, whose sockets it holds open; and signals that ask a run to stop are its rank's business.
A worker that dies is an error of its rank: torch raises it from SIGCHLD, wherever the rank is just then.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from hpcdl.distributed.engine import Batch
from hpcdl.errors import HpcdlError
from hpcdl.worker import growth
from hpcdl.worker.data.batches import Order, batch, share
from hpcdl.worker.data.prepare import Rows
from hpcdl.worker.process import kill_with_parent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NOT_MINE = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Slurm and terminals send these to every process of a step; the rank saves and stops, and closes its workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Which samples one rank reads in each step."""

    seed: int
    """Of the order."""
    global_batch_size: int
    """Samples of a step, over all ranks."""
    micro_batch_size: int
    """Samples of a micro-batch."""
    rank: int
    """This rank among those that read different samples."""
    ranks: int
    """How many those are."""
    last_step: int
    """Nothing is read ahead beyond it."""

    def all_rows(self, order: Order, step: int) -> NDArray[np.int64]:
        """Rows of the global batch of `step`, which counts from 1, `(global_batch_size,)`."""
        return order.rows((step - 1) * self.global_batch_size, self.global_batch_size)

    def micro_rows(self, order: Order, step: int) -> list[NDArray[np.int64]]:
        """Rows of each of this rank's micro-batches of `step`."""
        mine = share(self.all_rows(order, step), self.rank, self.ranks)
        return [mine[at : at + self.micro_batch_size] for at in range(0, len(mine), self.micro_batch_size)]


class Loader:
    """This rank's micro-batches, step by step."""

    def __init__(
        self, part: Rows, reading: Reading, device: torch.device, *, workers: int = 0, prefetch: int = 2
    ) -> None:
        """Starts nothing yet: workers start with the first step that is asked for.

        Args:
            part: the rows.
            reading: which of them.
            device: where batches go; through page-locked memory where it is a GPU.
            workers: processes that build batches; 0: this process builds them when they are asked for.
            prefetch: micro-batches that each worker holds ready.
        """
        self._part = part
        self._reading = reading
        self._device = device
        self._workers = workers
        self._prefetch = prefetch
        self._order = Order(len(part), reading.seed)
        self._batches: Iterator[Batch] | None = None
        self._next = 0

    def counts(self, step: int) -> tuple[int, int]:
        """Of the global batch of `step`: target tokens, and input tokens that are no padding."""
        sums = self._part.counts[self._reading.all_rows(self._order, step)].sum(axis=0)
        return int(sums[0]), int(sums[1])

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's share of the global batch of `step`, on its device, in order.

        Steps in a row are read ahead; a jump starts anew from there.

        Raises:
            HpcdlError: a worker has died.
        """
        if self._batches is None or step != self._next:
            self.close()
            self._batches = self._start(step)
        count = -(-self._reading.global_batch_size // self._reading.ranks // self._reading.micro_batch_size)
        try:
            made = [next(self._batches) for _ in range(count)]
        except (RuntimeError, OSError, EOFError) as error:
            told = self._death(error)
            if not told:
                raise
            raise HpcdlError(
                f"a process that loads data has died: {told} (data.workers={self._workers};"
                " data.workers=0 loads in the training process)"
            ) from error
        self._next = step + 1
        if self._device.type != "cuda":
            return made
        return [{name: t.to(self._device, non_blocking=True) for name, t in one.items()} for one in made]

    def _death(self, error: Exception) -> str:
        """The worker that has died, if that is what `error` comes of.

        torch says so itself when it hears of it by a signal or while it waits for a batch. A worker that dies while
        this process fetches a batch's memory from it leaves no more than a broken connection.
        """
        if isinstance(error, RuntimeError):
            return str(error) if "DataLoader worker" in str(error) else ""
        for worker in getattr(self._batches, "_workers", ()):
            worker.join(1)  # its connection breaks a moment before it is gone
            if worker.exitcode:
                return (
                    f"DataLoader worker (pid {worker.pid}) exited unexpectedly (exit code {worker.exitcode})"
                )
        return ""

    def close(self) -> None:
        """Ends the workers; another step may still be asked for."""
        batches, self._batches = self._batches, None
        end: Any = getattr(batches, "_shutdown_workers", None)
        if end is not None:  # torch ends them when the iterator is collected; here and now is safer
            end()

    def _start(self, step: int) -> Iterator[Batch]:
        many = self._workers > 0
        ahead: dict[str, Any] = {}
        if many:
            ahead = {
                "prefetch_factor": self._prefetch,
                "multiprocessing_context": "fork",
                "worker_init_fn": _begin,
            }
        return iter(
            DataLoader(
                _MicroBatches(self._part),
                batch_size=None,
                sampler=_Steps(self._reading, len(self._part), step),
                num_workers=self._workers,
                pin_memory=self._device.type == "cuda",
                # Its own: each start draws a seed, and dropout after a resume must draw what it would have.
                generator=torch.Generator(),
                **ahead,
            )
        )


class _MicroBatches(Dataset[Batch]):
    """Rows → a micro-batch on the CPU."""

    def __init__(self, part: Rows) -> None:
        self._part = part

    def __getitem__(self, rows: NDArray[np.int64]) -> Batch:
        growth.built()
        return batch(self._part, rows, torch.device("cpu"))


class _Steps(Sampler["NDArray[np.int64]"]):
    """The rows of each micro-batch from one step to the last."""

    def __init__(self, reading: Reading, size: int, step: int) -> None:
        self._reading = reading
        self._order = Order(size, reading.seed)  # runs ahead of the loop's
        self._step = step

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for step in range(self._step, self._reading.last_step + 1):
            yield from self._reading.micro_rows(self._order, step)


def _begin(number: int) -> None:
    """A worker's first act."""
    for asked in NOT_MINE:
        signal.signal(asked, signal.SIG_IGN)
    kill_with_parent()
    growth.begin_loader()
