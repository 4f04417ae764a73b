"""Safetensors files a tensor at a time: read without mapping them, written as tensors come.

Reading through a mapping would count every page that was touched as this process's memory; a plain read into
one tensor's buffer does not. A header that doesn't fit its file is found before any weight is read.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hpcdl.errors import HpcdlError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LARGEST_HEADER = 100_000_000
"""As the library has it."""
ALIGNED = 64
"""Tensors that are written begin at multiples of this, so that a mapped one is as good as an own one."""
SYNC_BYTES = 2**28
"""What is written is sent to the disk each time so much has come, not all at the end."""
CHUNK_BYTES = 2**25
"""What `copy` holds at a time."""

SHARD_BYTES = 5 * 10**9
"""Of a file that `save` makes, at most; a larger tensor has a file to itself."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor in a file."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    """Where its bytes begin in the file."""
    size: int
    """How many they are."""

    def __str__(self) -> str:
        return f"{self.name} in {self.file}"

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            HpcdlError: the file can't be read, or has become shorter.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self._into(tensor, self.first)
        return tensor

    def parts(self, weights: int) -> Iterator[Tensor]:
        """Its numbers in order, about so many at a time, each part `(n,)`.

        Raises:
            HpcdlError: as `read`.
        """
        each = self.dtype.itemsize
        for at in range(0, self.size, weights * each):
            part = torch.empty(min(weights, (self.size - at) // each), dtype=self.dtype)
            self._into(part, self.first + at)
            yield part

    def _into(self, tensor: Tensor, at: int) -> None:
        if not tensor.numel():
            return
        view = _bytes(tensor)
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(at)
                while len(view):
                    got = file.readinto(view)
                    if not got:
                        raise HpcdlError(f"{self.file} ends within {self.name}: the file is cut short")
                    view = view[got:]
        except OSError as error:
            raise HpcdlError(f"{self} can't be read: {error}") from error


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, in its own memory."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def header(file: Path) -> dict[str, Piece]:
    """The tensors of a safetensors file.

    Raises:
        HpcdlError: the file is missing, cut short or no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            text = opened.read(length) if 0 < length <= min(LARGEST_HEADER, size) else b""
    except OSError as error:
        raise HpcdlError(f"{file} can't be read: {error.strerror}") from error
    if not text or len(text) < length:
        raise HpcdlError(f"{file} is cut short within its header, or no safetensors file: {size:,} bytes")
    try:
        found = dict(_pieces(file, json.loads(text), 8 + length))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HpcdlError(f"{file} has a header that is no safetensors header: {error}") from error
    for piece in found.values():
        if piece.first + piece.size > size:
            have = max(0, size - piece.first)
            raise HpcdlError(
                f"{file} is cut short: {piece.name} has {have:,} of its {piece.size:,} bytes"
                f" ({size:,} bytes in the file)"
            )
    return found


def _pieces(file: Path, entries: dict[str, Any], start: int) -> Iterator[tuple[str, Piece]]:
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        first, last = entry["data_offsets"]
        if last - first != dtype.itemsize * torch.Size(shape).numel() or first < 0:
            raise ValueError(f"{name} has {last - first} bytes, and its shape is {shape} of {entry['dtype']}")
        yield name, Piece(file, name, dtype, shape, start + first, last - first)


def files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, with its index where it has one; none where it has other files."""
    if (folder / INDEX).is_file():
        return [folder / INDEX, *sorted({folder / name for name in _index(folder).values()})]
    return [folder / SINGLE] if (folder / SINGLE).is_file() else []


def pieces(folder: Path) -> dict[str, Piece]:
    """All tensors of a checkpoint: of the files that its index names, or of the one that it is.

    Raises:
        HpcdlError: a file is missing or broken, or lacks a tensor that the index says it has.
    """
    if not (folder / INDEX).is_file():
        return header(folder / SINGLE)
    wanted = _index(folder)
    found: dict[str, Piece] = {}
    for name in sorted(set(wanted.values())):
        file = folder / name
        inside = sorted(tensor for tensor, where in wanted.items() if where == name)
        if not file.is_file():
            raise HpcdlError(
                f"{file} is missing: {INDEX} says that it has {inside[0]}, and {len(inside)} in all"
            )
        here = header(file)
        lost = [tensor for tensor in inside if tensor not in here]
        if lost:
            raise HpcdlError(f"{file} lacks {lost[0]}, which {INDEX} says it has; {len(lost)} such in all")
        found |= here
    return found


def _index(folder: Path) -> dict[str, str]:
    file = folder / INDEX
    try:
        table = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): str(name) for tensor, name in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HpcdlError(f"{file} is no index of a checkpoint: {error!r}") from error


class Writer:
    """A safetensors file that is written tensor by tensor, by several threads if need be.

    Its header's place is kept free at the start and filled in at the end.
    """

    def __init__(self, file: Path, tensors: int) -> None:
        """Creates the file.

        Args:
            file: where.
            tensors: about how many will come.
        """
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._start = (4096 + 512 * tensors) // 4096 * 4096 + 4096
        self._entries: dict[str, Any] = {}
        self._end = 0
        self._unsynced = 0
        self._lock = Lock()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            os.close(self._descriptor)

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor."""
        data = tensor.detach().contiguous()
        at = self._place(name, data.dtype, tuple(data.shape), data.nbytes)
        self._write(data, at)

    def copy(self, piece: Piece, name: str, dtype: torch.dtype) -> None:
        """Writes a tensor of another file in `dtype`, a part at a time."""
        count = piece.size // piece.dtype.itemsize
        at = self._place(name, dtype, piece.shape, count * dtype.itemsize)
        for part in piece.parts(CHUNK_BYTES // 4):
            data = part.to(dtype)
            self._write(data, at)
            at += data.nbytes

    def _place(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], size: int) -> int:
        with self._lock:
            at = self._end
            self._entries[name] = _entry(dtype, shape, at, size)
            self._end = at + size
            gap = -self._end % ALIGNED
            if gap:  # the format has no holes
                self._entries[f"_gap.{self._end}"] = _entry(torch.uint8, (gap,), self._end, gap)
                self._end += gap
            return self._start + at

    def _write(self, data: Tensor, at: int) -> None:
        view = _bytes(data)
        while len(view):
            done = os.pwrite(self._descriptor, view, at)
            view, at = view[done:], at + done
        with self._lock:
            self._unsynced += data.nbytes
            due = self._unsynced >= SYNC_BYTES
            if due:
                self._unsynced = 0
        if due:
            os.fdatasync(self._descriptor)

    def _finish(self) -> None:
        text = json.dumps(self._entries).encode()
        room = self._start - 8
        assert len(text) <= room, "more tensors than were announced"
        os.pwrite(self._descriptor, struct.pack("<Q", room) + text.ljust(room), 0)
        os.ftruncate(self._descriptor, self._start + self._end)


def rewrite(source: Path, target: Path, change: Callable[[Piece], Tensor | None]) -> None:
    """Writes a file with the same header and other numbers, a tensor at a time.

    Args:
        source: the file that it is like.
        target: the new one.
        change: a tensor of the same dtype and shape, or None where it stays as it is.

    Raises:
        HpcdlError: the source is broken, or the target can't be written.
    """
    inside = sorted(header(source).values(), key=lambda piece: piece.first)
    try:
        with source.open("rb") as old, target.open("wb") as new:
            start = old.read(8)
            new.write(start + old.read(struct.unpack("<Q", start)[0]))
            for piece in inside:
                new.seek(piece.first)
                made = change(piece)
                assert made is None or (made.dtype, tuple(made.shape)) == (piece.dtype, piece.shape), piece
                for part in piece.parts(CHUNK_BYTES) if made is None else (made,):
                    raw: Any = part.contiguous().reshape(-1).view(torch.uint8).numpy()
                    new.write(memoryview(raw))
            new.truncate(source.stat().st_size)
            new.flush()
            os.fsync(new.fileno())
    except OSError as error:
        raise HpcdlError(f"{target} can't be written: {error.strerror}") from error


def _entry(dtype: torch.dtype, shape: tuple[int, ...], at: int, size: int) -> dict[str, Any]:
    return {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}


def save(
    folder: Path, tensors: Mapping[str, Tensor], done: Callable[[Tensor], None] = lambda part: None
) -> None:
    """Writes a model's weights under the names that transformers looks for, a part at a time.

    Args:
        folder: is there.
        tensors: by name, in the order of the files; on the CPU, contiguous.
        done: is called with each part of a tensor that has been written.

    Raises:
        HpcdlError: the disk is full.
    """
    shards = list(_in_shards(tensors))
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        where.update(dict.fromkeys(names, file))
        try:
            _save(folder / file, {name: tensors[name] for name in names}, done)
        except OSError as error:
            raise HpcdlError(f"{folder / file} can't be written: {error.strerror}") from error
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1)
        (folder / INDEX).write_text(text, encoding="utf-8")


def _in_shards(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _save(file: Path, tensors: Mapping[str, Tensor], done: Callable[[Tensor], None]) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        entries[name] = _entry(tensor.dtype, tuple(tensor.shape), at, tensor.nbytes)
        at += tensor.nbytes
    text = json.dumps(entries).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            flat = tensor.detach().view(-1)
            for begin in range(0, flat.numel(), CHUNK_BYTES // 4):
                part = flat[begin : begin + CHUNK_BYTES // 4]
                opened.write(_bytes(part))
                done(part)
