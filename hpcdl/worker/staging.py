"""Copies what a rank is about to write, so that training goes on while it is written.

Imported with torch.distributed.checkpoint, which takes half a second: not before the first save.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Event
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem


class StagedPlanner(DefaultSavePlanner):
    """Once all ranks know who writes what, copies this rank's share, and writes the copy.

    Ranks that hold the same tensors share out the writing, and each copies only what it writes. The state
    may change from the moment that `copied` is set.
    """

    def __init__(self, buffers: dict[MetadataIndex, Tensor], copied: Event, after: Any) -> None:
        """Takes what belongs to one save.

        Args:
            buffers: host memory of the save before, used again and replaced; empty at the first.
            copied: set once the state may change.
            after: a CUDA event; copies begin when what was queued before it is done. None on CPU.
        """
        super().__init__()
        self._buffers = buffers
        self._copied = copied
        self._after = after

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Copies; called with what this rank is to write."""
        plan = super().finish_plan(new_plan)
        sources = {item.index: self.lookup_object(item.index).detach() for item in plan.items}
        buffers = {index: _buffer(source, self._buffers.get(index)) for index, source in sources.items()}
        self._buffers.clear()
        self._buffers.update(buffers)
        if self._after is None:
            for index, source in sources.items():
                buffers[index].copy_(source)
        else:
            _copy_from_gpu(sources, buffers, self._after)
        self._copied.set()
        return plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """What is written for an item of the plan: the copy."""
        return self._buffers[write_item.index]


class PassingSaver(DefaultSavePlanner):
    """Writes tensor by tensor, and lets each go when the next one's turn has come."""

    def __init__(self, let_go: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._let_go = let_go
        self._last: Tensor | None = None

    def resolve_data(self, write_item: WriteItem) -> Any:
        """What is written for an item of the plan."""
        if self._last is not None:
            self._let_go(self._last)
        found = super().resolve_data(write_item)
        self._last = found if isinstance(found, Tensor) else None
        return found


class PassingLoader(DefaultLoadPlanner):
    """Reads tensor by tensor, and lets each go."""

    def __init__(self, let_go: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._let_go = let_go

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """A tensor has been read."""
        super().commit_tensor(read_item, tensor)
        self._let_go(tensor)


def _buffer(source: Tensor, known: Tensor | None) -> Tensor:
    if known is not None and known.shape == source.shape and known.dtype == source.dtype:
        return known
    # From pinned memory a GPU copies by itself, beside what it computes.
    return torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)


def _copy_from_gpu(
    sources: dict[MetadataIndex, Tensor], buffers: dict[MetadataIndex, Tensor], after: Any
) -> None:
    stream = torch.cuda.Stream(after.device)  # type: ignore[no-untyped-call]
    stream.wait_event(after)
    with torch.cuda.stream(stream):
        for index, source in sources.items():
            buffers[index].copy_(source, non_blocking=True)
    stream.synchronize()
