"""Weights in shared memory that all processes of one machine update without locks.

Source: hpcdl/parallel/hogwild.py.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpcdl.distributed.collectives import average
from hpcdl.distributed.engine import Batch, Engine, staleness_report
from hpcdl.distributed.local import root_mean_square
from hpcdl.distributed.mesh import Grid
from hpcdl.distributed.parallelize import Job
from hpcdl.errors import HpcdlError

SHARED_MEMORY = Path("/dev/shm")
STALENESS = "own.hogwild.staleness"
"""Name in a checkpoint of the updates' count, and the sum and maximum of their staleness."""
ALIGNMENT = 64
"""Bytes of a cache line: no two tensors share one."""


class HogwildEngine(Engine):
    """A process that computes gradients with the shared weights and changes them in place."""

    def __init__(self, stage: nn.Module, grid: Grid, job: Job, *, max_staleness: int) -> None:
        """Moves the weights into shared memory.

        Args:
            stage: the whole model, on the CPU.
            grid: only `dp_replicate` may be above 1; all ranks on one machine.
            job: what the training asks for.
            max_staleness: steps by which a process may be ahead of the slowest.

        Raises:
            HpcdlError: there isn't room for them, or a rank is on another machine.
        """
        super().__init__([stage], grid, job.make_optimizer, autocast=job.autocast)
        self.lag = max_staleness
        self._rank = grid.rank("dp_replicate")
        self._processes = grid.dims.dp_replicate
        self._group = grid.group("dp_replicate")
        self._bound = (self._processes - 1) * (2 * max_staleness + 1)
        self._begun = False
        self._seen = 0
        for options in self.optimizer.param_groups:
            if "betas" in options:  # one update of this process's is one of `processes`
                options["betas"] = tuple(beta**self._processes for beta in options["betas"])
        counters = torch.zeros(self._processes, 3, dtype=torch.int64)
        weights = [p.detach() for p in self.trainable.values()]
        shared = share([counters, *weights], first=self._rank == 0)
        self._counters = shared[0]
        """A row a process, which alone writes it: updates, sum and maximum of their staleness."""
        for parameter, place in zip(self.trainable.values(), shared[1:], strict=True):
            parameter.data = place

    # --- a step -------------------------------------------------------------------------------------------

    def accumulate(self, batches: Sequence[Batch], targets: int) -> Tensor:
        """As every engine's, with weights that others change meanwhile."""
        self._seen = self._updates_of_others()
        return super().accumulate(batches, targets)

    def step(self, learning_rate: float, max_norm: float | None) -> float:
        """Changes the weights by this process's gradient.

        Returns:
            The norm of this process's own gradient before clipping.
        """
        self._begun = True
        staleness = self._updates_of_others() - self._seen
        norm = super().step(learning_rate / self._processes, max_norm)
        mine = self._counters[self._rank]
        mine[1] += staleness
        mine[2] = max(int(mine[2]), staleness)
        mine[0] += 1
        assert staleness <= self._bound, f"an update is {staleness} others late; {self._bound} at most"
        return norm

    def _updates_of_others(self) -> int:
        return int(self._counters[:, 0].sum() - self._counters[self._rank, 0])

    def norm_of(self, norms: Tensor) -> float:
        """The root mean square of the processes' norms."""
        return root_mean_square(norms)

    def report(self) -> dict[str, float]:
        """Mean and maximum of all updates' staleness, in updates of other processes."""
        return staleness_report(*self._staleness())

    def _staleness(self) -> tuple[int, int, int]:
        """Of all processes together: updates, sum and maximum of their staleness."""
        updates, total = self._counters[:, :2].sum(dim=0).tolist()
        return updates, total, int(self._counters[:, 2].max())

    # --- state --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """The shared weights and the average of the processes' optimizer states, from rank 0.

        After the first step a copy: a process that has gone on may change the weights while it is written.
        """
        found = super().state()
        if self._begun:
            found = {name: value.clone() for name, value in found.items()}
            average([v for name, v in found.items() if name.startswith("optimizer.")], self._group)
        self._loaded = torch.tensor(self._staleness(), dtype=torch.int64)
        dist.barrier()
        return found | {STALENESS: self._loaded} if self._rank == 0 else {}

    def restored(self, step: int, keys: frozenset[str]) -> None:
        """Rank 0 has loaded; the others get its optimizer state."""
        for name, value in super().state().items():
            if name.startswith("optimizer."):
                dist.broadcast(value, src=0)
        super().restored(step, keys)
        if self._rank == 0 and STALENESS in keys:
            self._counters[0] = self._loaded
        dist.barrier()

    def close(self) -> None:
        """Takes the weights back out of shared memory: saved from there, they would all seem tied."""
        for parameter in self.trainable.values():
            parameter.data = parameter.data.clone()


def share(tensors: Sequence[Tensor], *, first: bool) -> list[Tensor]:
    """The first rank's values in memory that all ranks of this machine share, in tensors of the same shapes.

    The memory has no name any more when this returns: it goes when the last process goes.

    Args:
        tensors: CPU tensors, of the same shapes and dtypes on every rank.
        first: whether this is the rank that makes it.

    Raises:
        HpcdlError: there is no room, or this rank is on another machine than the first.
    """
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    told: list[str] = [_make(sum(sizes)) if first else ""]
    dist.broadcast_object_list(told, src=0)
    path = Path(told[0])
    problem = "" if told[0].startswith("/") else told[0]
    if not problem and not path.exists():
        problem = f"{os.uname().nodename} doesn't see {path} of rank 0: hogwild is for one machine"
    everyone: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, problem)
    mapped: list[Tensor] = []
    if not any(everyone):
        memory = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=sum(sizes))
        assert isinstance(memory, torch.UntypedStorage)
        mapped = _places(memory, tensors, sizes)
        if first:
            for place, tensor in zip(mapped, tensors, strict=True):
                place.copy_(tensor)
        dist.barrier()
    if first:
        path.unlink(missing_ok=True)
    if not mapped:
        raise HpcdlError(next(said for said in everyone if said))
    return mapped


def _make(size: int) -> str:
    """A file in shared memory with room for `size` bytes; or why there is none."""
    if not SHARED_MEMORY.is_dir():
        return f"{os.uname().nodename} has no shared memory: {SHARED_MEMORY} is missing"
    descriptor, path = tempfile.mkstemp(prefix="hpcdl-hogwild-", dir=SHARED_MEMORY)
    try:
        os.posix_fallocate(descriptor, 0, size)  # else a write without room would kill the process: SIGBUS
    except OSError as error:
        Path(path).unlink()
        if error.errno != errno.ENOSPC:
            raise
        room = os.statvfs(SHARED_MEMORY)
        return (
            f"the trained weights need {size / 2**20:.0f} MiB of shared memory, and {SHARED_MEMORY} on"
            f" {os.uname().nodename} has {room.f_bavail * room.f_frsize / 2**20:.0f} free"
            " (in a container: --shm-size)"
        )
    finally:
        os.close(descriptor)
    return path


def _places(memory: torch.UntypedStorage, tensors: Iterable[Tensor], sizes: Iterable[int]) -> list[Tensor]:
    places, offset = [], 0
    for tensor, size in zip(tensors, sizes, strict=True):
        place = torch.empty(0, dtype=tensor.dtype)
        places.append(
            place.set_(memory, offset // tensor.element_size(), tensor.shape, tensor.contiguous().stride())
        )
        offset += size
    return places
