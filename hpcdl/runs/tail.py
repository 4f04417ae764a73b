"""Following files that others append to, replace or have yet to make."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Tail:
    """The new whole lines of one file, each call from where the last one ended."""

    path: Path
    _offset: int = 0
    _inode: int | None = None
    _rest: bytes = field(default=b"", repr=False)

    def lines(self) -> list[str]:
        """Whole lines since the last call; from the beginning again if the file was replaced or cut short."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._offset, self._rest = 0, b""
                self._inode = status.st_ino
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [line.decode("utf-8", errors="replace").rstrip("\r") for line in whole]

    def rest(self) -> str:
        """What stands after the last whole line: its writer was killed, if the run is over."""
        return self._rest.decode("utf-8", errors="replace")

    def records(self) -> list[dict[str, Any]]:
        """The new lines as JSON objects; what isn't one is left out."""
        records = []
        for line in self.lines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                records.append(record)
        return records
