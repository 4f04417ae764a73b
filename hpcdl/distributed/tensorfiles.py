"""Files of safetensors, read a tensor at a time: little memory, and errors that name the file and the tensor.

A file is 8 bytes with the length of a header, the header (JSON: each tensor's dtype, shape and place), and the
tensors' bytes one after another. Source: the format's own description, huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from hpcdl.errors import HpcdlError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The format's names of torch's dtypes."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PIECE = 2**23
"""Numbers that `fill` reads and `write` writes at a time."""
SHARD_BYTES = 5 * 10**9
"""Of a file that `write` makes, at most; a larger tensor has a file to itself."""
MOST_HEADER = 100_000_000
"""Bytes of a header at most, as in the format's description."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    """Its first byte in the file."""
    end: int
    """The byte after its last."""


class TensorFile:
    """A file's header, checked against its size; tensors are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
            HpcdlError: the file isn't there, is cut off, or is no such file.
        """
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = file.read(length) if length <= min(size, MOST_HEADER) else b""
        except OSError as error:
            raise HpcdlError(f"{path} can't be read: {error.strerror}") from error
        if size < 8 or len(header) < length:
            raise HpcdlError(f"{path} is torn, or no safetensors file: its {size} bytes hold no whole header")
        self.head = length.to_bytes(8, "little") + header
        """Everything before the tensors' bytes."""
        try:
            told: dict[str, Any] = json.loads(header)
            told.pop("__metadata__", None)
            entries = [self._entry(name, each) for name, each in told.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HpcdlError(f"{path} is torn, or no safetensors file: {error}") from error
        self.entries = {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.first)}
        """By name, in the order of their bytes."""
        self._check(size)

    def _entry(self, name: str, told: dict[str, Any]) -> Entry:
        first, end = told["data_offsets"]
        if told["dtype"] not in DTYPES:
            raise HpcdlError(f"{self.path}: {name} has a dtype that isn't known here: {told['dtype']}")
        start = len(self.head)
        return Entry(name, DTYPES[told["dtype"]], tuple(told["shape"]), start + first, start + end)

    def _check(self, size: int) -> None:
        at = len(self.head)
        for entry in self.entries.values():
            wanted = math.prod(entry.shape) * entry.dtype.itemsize
            if entry.first != at or entry.end - entry.first != wanted:
                raise HpcdlError(
                    f"{self.path} is damaged: {entry.name} {entry.shape} takes {wanted} bytes from {at},"
                    f" and the header says {entry.first} to {entry.end}"
                )
            at = entry.end
            if at > size:
                raise HpcdlError(
                    f"{self.path} is cut off: its {size} bytes end before {entry.name} does, at {at};"
                    " copy it anew"
                )
        if at != size:
            raise HpcdlError(f"{self.path} is damaged: {size - at} bytes come after its last tensor")

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            HpcdlError: the file has become shorter, or the disk fails.
        """
        entry = self.entries[name]
        data = bytearray(entry.end - entry.first)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(entry.first)
                view, done = memoryview(data), 0
                while done < len(data):  # a read gives 2 GiB at most
                    got = file.readinto(view[done:])
                    if not got:
                        raise HpcdlError(f"{self.path} is cut off in {name}; copy it anew")
                    done += got
        except OSError as error:
            raise HpcdlError(f"{self.path}: {name} can't be read: {error.strerror}") from error
        if not data:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)

    def fill(self, name: str, target: Tensor, done: Callable[[Tensor], None]) -> None:
        """One tensor into another of its shape and any dtype, piece by piece: never whole in memory.

        Args:
            name: which.
            target: contiguous.
            done: is called with each piece of it once it is filled.

        Raises:
            HpcdlError: the shape is another, the file has become shorter, or the disk fails.
        """
        entry = self.entries[name]
        if tuple(target.shape) != entry.shape:
            raise HpcdlError(
                f"{self.path}: {name} is {entry.shape}, and the model wants {tuple(target.shape)}"
            )
        at = entry.first
        try:
            with self.path.open("rb", buffering=0) as file:
                for part in _pieces(target):
                    data = bytearray(part.numel() * entry.dtype.itemsize)
                    file.seek(at)
                    if file.readinto(data) != len(data):
                        raise HpcdlError(f"{self.path} is cut off in {name}; copy it anew")
                    part.copy_(torch.frombuffer(data, dtype=entry.dtype))
                    done(part)
                    at += len(data)
        except OSError as error:
            raise HpcdlError(f"{self.path}: {name} can't be read: {error.strerror}") from error


def of_folder(folder: Path) -> list[TensorFile]:
    """The files of a model's folder that hold its weights, each checked.

    Raises:
        HpcdlError: there are none, one is missing or torn, or a tensor isn't where the index says.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise HpcdlError(f"{folder} holds no safetensors (neither {SINGLE} nor {INDEX})")
        return [TensorFile(folder / SINGLE)]
    try:
        where: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise HpcdlError(f"{index} can't be read: {error}") from error
    for name, file in where.items():
        if not (folder / file).exists():
            raise HpcdlError(f"{folder / file} is missing: {index.name} says that it holds {name}")
    files = {file: TensorFile(folder / file) for file in sorted(set(where.values()))}
    for name, file in where.items():
        if name not in files[file].entries:
            raise HpcdlError(f"{folder / file} does not hold {name}, though {index.name} says so")
    return list(files.values())


def write(folder: Path, tensors: Mapping[str, Tensor], done: Callable[[Tensor], None]) -> None:
    """Writes a model's weights under the names that transformers looks for, piece by piece.

    Args:
        folder: is there.
        tensors: by name, on the CPU, contiguous.
        done: is called with each piece of a tensor that has been written.

    Raises:
        HpcdlError: the disk is full.
    """
    shards = list(_in_shards(tensors))
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        where.update(dict.fromkeys(names, file))
        try:
            _write_one(folder / file, {name: tensors[name] for name in names}, done)
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


def _write_one(path: Path, tensors: Mapping[str, Tensor], done: Callable[[Tensor], None]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    known = {dtype: name for name, dtype in DTYPES.items()}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.nbytes
        header[name] = {
            "dtype": known[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for part in _pieces(tensor.detach()):
                file.write(memoryview(cast(Any, part.view(torch.uint8).numpy())))
                done(part)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.view(-1)
    return (flat[at : at + PIECE] for at in range(0, flat.numel(), PIECE))
