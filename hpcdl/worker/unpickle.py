"""A checkpoint's `.metadata` without running anything of it.

torch.distributed.checkpoint keeps there which tensor lies where, as a pickle, and reads it with `pickle.load`: whoever
can put a checkpoint before us could run code. Here a pickle's names stand for empty classes of our own, made anew for
each file; what they were filled with is then checked and copied into the classes that torch wants. A tensor's own bytes
are read by torch with `weights_only=True`. Objects other than tensors, which torch would unpickle freely, are refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from hpcdl.errors import HpcdlError

_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_CLASSES = {
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "ChunkStorageMetadata"),
    (_FILES, "_StorageInfo"),
}
_UNUSED = {
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    # How Python 3.11.2 writes a member of an enumeration: of the one above. It stands for nothing here.
    ("builtins", "getattr"),
    ("torch.serialization", "_get_layout"),
}
_PATHS = {"PosixPath", "PurePosixPath", "WindowsPath", "Path"}


class SafeReader(FileSystemReader):
    """Reads a checkpoint that may be anybody's."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds, and where.

        Raises:
            HpcdlError: it isn't what hpcdl writes; nothing of it was executed.
        """
        found = read_metadata(Path(self._get_metadata_path(kwargs.get("rank"))))
        assert found.storage_meta is not None
        found.storage_meta.load_id = self.load_id
        return found


def read_metadata(file: Path) -> Metadata:
    """The content of a `.metadata` file.

    Raises:
        HpcdlError: it isn't what hpcdl writes; nothing of it was executed.
        OSError: it can't be read.
    """
    try:
        with file.open("rb") as opened:
            return _metadata(_Unpickler(opened).load())
    except OSError:
        raise
    except Exception as error:  # what a pickle that somebody made up can raise has no end
        raise HpcdlError(f"{file} is not what hpcdl writes, and was not executed: {error}") from error


class _StandIn:
    """What the file says of one object: nothing of it is called, or set elsewhere than here."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        # Made anew for each file: a pickle can also change the classes that it is given.
        self._made: dict[tuple[str, str], Any] = {key: type(key[1], (_StandIn,), {}) for key in _CLASSES}
        # A memory format, and the folder that it was written to, are of no use here.
        self._nothing = lambda *_: None

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the file stands for."""
        if (module, name) in self._made:
            return self._made[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) in _UNUSED or (module.startswith("pathlib") and name in _PATHS):
            return self._nothing
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _metadata(plain: Any) -> Metadata:
    fields = _fields(plain, "Metadata")
    tensors = {_text(name): _tensor(each) for name, each in _mapping(fields["state_dict_metadata"]).items()}
    places = dict(_place(index, info) for index, info in _mapping(fields["storage_data"]).items())
    return Metadata(
        state_dict_metadata=tensors,  # type: ignore[arg-type]  # a dict of one of the two kinds
        planner_data={name: (name,) for name in tensors},  # as for every flat state
        storage_data=places,
        storage_meta=StorageMeta(),
        version=None if fields.get("version") is None else _text(fields["version"]),
    )


def _tensor(plain: Any) -> TensorStorageMetadata:
    fields = _fields(plain, "TensorStorageMetadata")
    properties = fields["properties"]
    if type(properties).__name__ != "TensorProperties" or not isinstance(properties.state, tuple):
        raise pickle.UnpicklingError("a tensor has no properties")
    dtype, gradient = properties.state[0], properties.state[2]
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor has no dtype")
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=dtype, requires_grad=bool(gradient)),
        size=_size(fields["size"]),
        chunks=[_chunk(each) for each in _list(fields["chunks"])],
    )


def _chunk(plain: Any) -> ChunkStorageMetadata:
    fields = _fields(plain, "ChunkStorageMetadata")
    return ChunkStorageMetadata(offsets=_size(fields["offsets"]), sizes=_size(fields["sizes"]))


def _place(index: Any, info: Any) -> tuple[MetadataIndex, _StorageInfo]:
    of, at = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
    offset, number = of.get("offset"), of.get("index")
    file = _text(at["relative_path"])
    if Path(file).name != file or file in ("", ".", ".."):
        raise pickle.UnpicklingError(f"a tensor lies outside of the checkpoint, in {file!r}")
    if at.get("transform_descriptors"):
        raise pickle.UnpicklingError("its tensors are written by an extension of torch's")
    key = MetadataIndex(
        _text(of["fqn"]),
        None if offset is None else _size(offset),
        None if number is None else _number(number),
    )
    return key, _StorageInfo(file, _number(at["offset"]), _number(at["length"]))


def _fields(plain: Any, kind: str) -> Mapping[str, Any]:
    if not isinstance(plain, _StandIn) or type(plain).__name__ != kind:
        raise pickle.UnpicklingError(f"a {kind} is wanted, and this is a {type(plain).__name__}")
    state: Mapping[str, Any] = _mapping(plain.state)
    return state


def _of(kind: type) -> Callable[[Any], Any]:
    def checked(plain: Any) -> Any:
        if type(plain) is not kind:
            raise pickle.UnpicklingError(f"a {kind.__name__} is wanted, and this is a {type(plain).__name__}")
        return plain

    return checked


_mapping, _text, _list = _of(dict), _of(str), _of(list)


def _number(plain: Any) -> int:
    if type(plain) is not int or plain < 0:
        raise pickle.UnpicklingError(f"{plain!r} is no size")
    return plain


def _size(plain: Any) -> torch.Size:
    return torch.Size(_number(each) for each in _of(torch.Size)(plain))
