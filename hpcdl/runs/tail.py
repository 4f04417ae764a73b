"""Following files that others append to, replace or have yet to make."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcdl.runs.private import open_to_read


@dataclass(slots=True)
class Tail:
    """The new whole lines of one file, each call from where the last one ended."""

    path: Path
    window: int | None = None
    """Bytes that are read at once at most: of a longer stretch the end. None: all of it."""
    glance: bool = False
    """Look at the file's size before opening it: cheap for many files, but a network file system may tell of new lines
    some seconds late, which it doesn't where the file is opened."""
    _offset: int = 0
    _inode: int | None = None
    _rest: bytes = field(default=b"", repr=False)
    skipped: int = 0
    """Bytes at the file's beginning that the window has left out; 0 again where the file was replaced."""
    replaced: bool = False
    """Whether the last call began anew: the file is another one, or was cut short."""

    def lines(self) -> list[str]:
        """Whole lines since the last call; from the beginning again if the file was replaced or cut short."""
        self.replaced = False
        try:
            if self.glance and self._is_as_it_was():
                return []
            with open_to_read(self.path) as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self.replaced = self._inode is not None
                    self._offset, self._rest, self.skipped = 0, b"", 0
                self._inode = status.st_ino
                cut = self._jump(status.st_size)
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        if cut and whole:
            whole.pop(0)  # the end of a line that began before the window
        return [line.decode("utf-8", errors="replace").rstrip("\r") for line in whole]

    def _is_as_it_was(self) -> bool:
        status = self.path.stat()
        return status.st_ino == self._inode and status.st_size == self._offset

    def _jump(self, size: int) -> bool:
        """Leaves out what is longer than the window; whether it did."""
        if self.window is None or size - self._offset <= self.window:
            return False
        self.skipped = self._offset = size - self.window
        self._rest = b""
        return True

    def rest(self) -> str:
        """What stands after the last whole line: its writer was killed, if the run is over."""
        return self._rest.decode("utf-8", errors="replace")

    def records(self) -> list[dict[str, Any]]:
        """The new lines as JSON objects; what isn't one is left out."""
        return [record for line in self.lines() if (record := as_record(line)) is not None]


def as_record(line: str) -> dict[str, Any] | None:
    """A line as a JSON object; None where it isn't one (torn, say)."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # the second: another user's file may hold anything
        return None
    return record if isinstance(record, dict) else None
