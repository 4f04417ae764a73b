"""Inputs of blocks that recompute their activations, kept elsewhere until the backward pass asks for them.

With every block recomputed, what is left of a forward pass is a residual stream a block: (batch, seq, width)
numbers. On a GPU they can wait in the host's page-locked memory, on a CPU on a disk.

Source of the idea: Rajbhandari et al., "ZeRO-Infinity", 2021, section 5.2 (checkpoints offloaded to host memory).
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hpcdl.errors import HpcdlError

SMALL = 2**14
"""Bytes of a tensor that stays where it is: losses, positions, rotary angles of a short sequence."""


def parking(where: str, device: torch.device) -> AbstractContextManager[Any]:
    """A context for forward passes: what autograd saves within goes there; it may be entered again and again.

    Args:
        where: `none`, `host` (a GPU's host memory) or `disk` (a file without a name in $TMPDIR).
        device: where the passes run.
    """
    if where == "host" and device.type != "cpu":
        return saved_tensors_hooks(_to_host, _from_host)
    if where == "disk":
        lot = Lot()
        return saved_tensors_hooks(lot.park, lot.fetch)
    return nullcontext()


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor] | Tensor:
    if tensor.nbytes <= SMALL or isinstance(tensor, torch.nn.Parameter):
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return tensor.device, host


def _from_host(parked: tuple[torch.device, Tensor] | Tensor) -> Tensor:
    if isinstance(parked, Tensor):
        return parked
    device, host = parked
    return host.to(device, non_blocking=True)


class Place:
    """Where in the file a tensor lies."""

    __slots__ = ("__weakref__", "device", "dtype", "offset", "shape", "size")

    def __init__(self, offset: int, tensor: Tensor) -> None:
        self.offset, self.size = offset, tensor.nbytes
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device


class Lot:
    """A file without a name: however the process ends, nothing of it is left."""

    def __init__(self) -> None:
        """Opens it in $TMPDIR (of a compute node: a disk of its own, not memory)."""
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the engine is
        self._end = 0
        self._free: dict[int, list[int]] = defaultdict(list)

    def park(self, tensor: Tensor) -> Place | Tensor:
        """Writes a tensor out; small ones and parameters stay.

        Raises:
            HpcdlError: the disk is full.
        """
        if tensor.nbytes <= SMALL or isinstance(tensor, torch.nn.Parameter):
            return tensor
        free = self._free[tensor.nbytes]
        place = Place(free.pop() if free else self._end, tensor)
        self._end = max(self._end, place.offset + place.size)
        # Given back when autograd lets go of it: after the backward pass, or where there is none.
        weakref.finalize(place, free.append, place.offset).atexit = False
        flat = tensor.detach().cpu().contiguous().flatten()
        left = flat.view(torch.uint8).numpy().data
        at = place.offset
        try:
            while left:
                written = os.pwrite(self._file.fileno(), left, at)
                left, at = left[written:], at + written
        except OSError as error:
            raise HpcdlError(
                f"trainer.activation_offload=disk: {tempfile.gettempdir()}: {error.strerror};"
                " $TMPDIR names another disk"
            ) from error
        return place

    def fetch(self, parked: Place | Tensor) -> Tensor:
        """Reads it again."""
        if isinstance(parked, Tensor):
            return parked
        found = torch.empty(parked.size, dtype=torch.uint8)
        left, at = found.numpy().data, parked.offset
        while left:
            read = os.preadv(self._file.fileno(), [left], at)
            assert read, "the file is as long as what was written"
            left, at = left[read:], at + read
        return found.view(parked.dtype).view(parked.shape).to(parked.device)
