"""Tensors that lie in a working file, or in host memory, and are in use now and then.

A tensor of the file is a view of its mapping: reading it brings pages in, `release` lets them go; what is
resident is what is in use. Pages are changed by `write`, through the file: a full disk is then an OSError rather
than a SIGBUS, and a thread can do it while the next layer computes. Both see the same page cache.

The file has no name (O_TMPFILE): however the process ends, nothing of it is left on the disk.
"""

from __future__ import annotations

import math
import mmap
import os
import resource
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpcdl.distributed.allocator import keep_no_holes
from hpcdl.errors import HpcdlError
from hpcdl.spec.streaming import UNDER_WAY

PAGE = mmap.PAGESIZE


class Shelf:
    """Tensors of zeros to begin with, each from its own pages. For one process and one thread of use."""

    def __init__(self, folder: Path | None, *, pin: bool = False) -> None:
        """Opens the working file.

        Args:
            folder: where it lies; None: tensors lie in host memory.
            pin: host memory is page-locked, so that a GPU copies from it by itself.

        Raises:
            HpcdlError: there can be no file.
        """
        self._folder = folder
        self._pin = pin
        self._mappings: dict[int, mmap.mmap] = {}
        """By the address of the tensor's storage."""
        self._offsets: dict[int, int] = {}
        self._end = 0
        self._writing: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-back") if folder else None
        if folder is not None:
            keep_no_holes()  # a layer's tensors come and go by the gigabyte
            _allow_files()
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
            except OSError as error:
                raise HpcdlError(
                    f"offload.folder={folder}: there can be no working file here: {error}"
                ) from error

    @property
    def bytes(self) -> int:
        """Size of the working file."""
        return self._end

    def new(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor of zeros.

        Raises:
            HpcdlError: the disk is full.
        """
        if self._folder is None:
            return torch.zeros(shape, dtype=dtype, pin_memory=self._pin)
        count = math.prod(shape)
        length = -(-count * dtype.itemsize // PAGE) * PAGE
        try:
            # Reserved now: a page that the disk has no room for would end the process at its first use.
            os.posix_fallocate(self._file.fileno(), self._end, length)
        except OSError as error:
            raise HpcdlError(
                f"offload.folder={self._folder}: no room for the working file, {self._end + length:,} bytes"
                f" so far: {error.strerror}"
            ) from error
        mapping = mmap.mmap(self._file.fileno(), length, offset=self._end)
        tensor = torch.frombuffer(mapping, dtype=dtype, count=count).view(shape)
        self._mappings[tensor.data_ptr()] = mapping
        self._offsets[tensor.data_ptr()] = self._end
        self._end += length
        return tensor

    def write(self, place: Tensor, content: Tensor) -> None:
        """Sets rows of a tensor to `content`, later: `settle` waits. `content` must not change any more.

        Args:
            place: consecutive rows of a tensor made by `new`, or all of it.
            content: as many numbers of the same dtype, on the CPU.

        Raises:
            OSError: this one or one before it can't be written.
        """
        if self._thread is None:
            place.copy_(content)
            return
        while len(self._writing) >= UNDER_WAY:
            self._writing.pop(0).result()
        assert place.is_contiguous() and place.dtype == content.dtype and place.shape == content.shape
        self._writing.append(self._thread.submit(self._write, place, content.contiguous()))

    def settle(self) -> None:
        """Waits until all is written.

        Raises:
            OSError: it can't be.
        """
        while self._writing:
            self._writing.pop(0).result()

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is the working file's."""
        return tensor.untyped_storage().data_ptr() in self._mappings

    def release(self, tensor: Tensor) -> None:
        """Lets a tensor's pages go; the next use brings them in again. Nothing for tensors that aren't the file's."""
        self._advise(tensor, mmap.MADV_DONTNEED)

    def expect(self, tensor: Tensor) -> None:
        """Has the disk read a tensor that will be wanted soon."""
        self._advise(tensor, mmap.MADV_WILLNEED)

    def _advise(self, tensor: Tensor, advice: int) -> None:
        base = tensor.untyped_storage().data_ptr()
        mapping = self._mappings.get(base)
        if mapping is None or not tensor.numel():
            return
        first = (tensor.data_ptr() - base) // PAGE * PAGE
        last = tensor.data_ptr() - base + tensor.nbytes
        mapping.madvise(advice, first, min(last - first, len(mapping) - first))

    def _write(self, place: Tensor, content: Tensor) -> None:
        base = place.untyped_storage().data_ptr()
        at = self._offsets[base] + place.data_ptr() - base
        # numpy knows no bf16: the bytes alone
        raw: Any = content.flatten().view(torch.uint8).numpy()
        left = memoryview(raw)
        while left:
            done = os.pwrite(self._file.fileno(), left, at)
            left, at = left[done:], at + done


def _allow_files() -> None:
    """As many open files as the system lets this process have: each mapping keeps a descriptor of its own."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
