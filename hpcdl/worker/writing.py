"""Writes a checkpoint's files with their checksums, in torch's distributed format; all ranks succeed or none does.

Imported with torch.distributed.checkpoint, which takes half a second: not before the first save.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from hpcdl.spec.checkpoint import Written


@dataclass(frozen=True, slots=True)
class Sums:
    """The files that a rank has written."""

    files: dict[str, Written]


class Summed:
    """A file that is written from its first byte to its last, and summed up on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._crc32 = 0
        self._size = 0

    @property
    def written(self) -> Written:
        """What has been written so far."""
        return Written(size=self._size, crc32=self._crc32)

    def write(self, data: bytes | memoryview) -> int:
        """As a file's."""
        done = self._file.write(data)
        self._crc32 = zlib.crc32(data, self._crc32)  # beside other threads: it lets the GIL go
        self._size += done
        return done

    def tell(self) -> int:
        """As a file's."""
        return self._file.tell()

    def flush(self) -> None:
        """As a file's."""
        self._file.flush()

    def fileno(self) -> int:
        """As a file's."""
        return self._file.fileno()

    def close(self) -> None:
        """As a file's."""
        self._file.close()


class SummedFiles(FileSystem):
    """Files whose checksums are known once they are written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, Written] = {}
        """By name."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Opens a file."""
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            summed = Summed(cast(IO[bytes], stream))
            yield cast(io.IOBase, summed)
        self.written[Path(path).name] = summed.written

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Renames a file that has been written."""
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class Writer(FileSystemWriter):
    """Writes this rank's files; on rank 0 also what is written once, when every rank has written.

    Whatever fails fails inside a collective of torch's `save`, which tells all ranks: none waits for one that has
    given up, and none takes for saved what another could not write.
    """

    def __init__(
        self,
        folder: Path,
        random_states: Mapping[str, Any],
        publish: Callable[[dict[str, Written]], None],
    ) -> None:
        """Takes what isn't in the state.

        Args:
            folder: where files are written.
            random_states: this rank's.
            publish: called on rank 0 with all ranks' files once they are on disk; makes them a checkpoint.
        """
        super().__init__(folder, sync_files=True)
        self.fs = self._files = SummedFiles()
        self._random_states = random_states
        self._publish = publish

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's share of the tensors, and its random states."""
        with _without_torchs_sums():
            results = super().write_data(plan, planner).value()
        path = Path(self.path) / f"rng-{self.rank:05d}.pt"
        with self._files.create_stream(path, "wb") as stream:
            torch.save(self._random_states, cast(IO[bytes], stream))
            stream.flush()
            os.fsync(stream.fileno())
        # With it the sums travel to rank 0, in the collective that also tells that all is written.
        told: Future[list[WriteResult]] = Future()
        told.set_result([*results, cast(WriteResult, Sums(dict(self._files.written)))])
        return told

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Rank 0, when every rank has written: the index of all tensors, and the record."""
        files: dict[str, Written] = {}
        for of_rank in results:
            files.update(cast(Sums, of_rank.pop()).files)
        super().finish(metadata, results)
        self._publish(files | self._files.written)


@contextmanager
def _without_torchs_sums() -> Iterator[None]:
    """torch.save sums up each tensor too, for zip's sake, and torch.load never looks: 3 GB/s would become 1.5."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)
