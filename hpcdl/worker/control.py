"""The one collective a step besides the gradients': every rank's small numbers, seen by all."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from hpcdl.errors import HpcdlError

WAITS = "hpcdl.wait"
"""What a profiler sees while a rank waits for others' numbers, which may be of a step that it began before."""


class Gathering:
    """Every rank's small numbers on their way to all ranks."""

    def __init__(self, values: Sequence[float | Tensor], device: torch.device) -> None:
        """Sends `values`; every rank must give as many, in the same order of calls."""
        plain = [0.0 if isinstance(v, Tensor) else float(v) for v in values]
        mine = torch.tensor(plain, dtype=torch.float64, device=device)  # in one go: a tensor each costs 10 µs
        for place, value in enumerate(values):
            if isinstance(value, Tensor):
                mine[place] = value.detach()
        self._everyone = [mine]
        self._work: Any = None
        ranks = dist.get_world_size()
        if ranks > 1:
            self._everyone = [torch.empty_like(mine) for _ in range(ranks)]
            self._work = dist.all_gather(self._everyone, mine, async_op=True)
            _on_their_way.add(self)

    def wait(self) -> Tensor:
        """All ranks' values, `(ranks, len(values))`, fp64, on the CPU.

        Gathered rather than reduced: sums over the rows come out bit for bit the same on every rank.
        """
        self.arrive()
        return torch.stack(self._everyone).cpu()

    def arrive(self) -> None:
        """Waits until they are here."""
        if self._work is not None:
            with record_function(WAITS):
                self._work.wait()
        _on_their_way.discard(self)


_on_their_way: weakref.WeakSet[Gathering] = weakref.WeakSet()


def settle() -> None:
    """Waits until all numbers that are on their way are here.

    To be called before a profiler is switched off: what has begun under it and ends later, in gloo's own thread,
    writes into what is gone by then (a segmentation fault, seen with torch 2.13).
    """
    for gathering in list(_on_their_way):
        gathering.arrive()


def gather(values: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Sends `values` and waits for everyone's, `(ranks, len(values))`."""
    return Gathering(values, device).wait()


def fingerprint(parameters: Iterable[nn.Parameter]) -> Tensor:
    """A number that differs where weights differ, fp64."""
    total = torch.zeros((), dtype=torch.float64)
    for number, parameter in enumerate(parameters, start=1):
        total += number * parameter.detach().sum(dtype=torch.float64).cpu()
    return total


def must_start_alike(weights: Tensor, device: torch.device) -> None:
    """Checks that all ranks start from the same trainable weights.

    Raises:
        HpcdlError: they don't (a folder that differs from node to node).
    """
    # Sums of the same numbers in the same order on the same kind of device: equal up to the last digits.
    sums = gather([weights], device)[:, 0]
    odd = (~torch.isclose(sums, sums[0], rtol=1e-6, atol=1e-6)).nonzero().flatten().tolist()
    if odd:
        raise HpcdlError(
            f"ranks {odd} start from other weights than rank 0: is model.path the same on every node?"
        )


def word_of_first(value: Any = None) -> Any:
    """Rank 0's `value`, on all ranks; what others give doesn't count."""
    words = [value]
    dist.broadcast_object_list(words, src=0)
    return words[0]


def words_of_all(value: Any) -> list[Any]:
    """Every rank's `value`, in the order of ranks, on all of them."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone
