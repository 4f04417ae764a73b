"""How many bytes of samples may be written: many while a run is young, then so many a day."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from hpcdl.runs.private import open_to_read

_DAY_S = 86400.0
FIRST_BYTES = 1_000_000
"""For a run's beginning, and after a quiet time."""
_LEAST_BYTES = 50_000
"""For the beginning of each further try."""
_KEPT = 0.25
"""Share of FIRST_BYTES that is left to moments that matter: memory that gets short, workers that have ended."""


class Allowance:
    """Bytes that one node's file may grow by: what has come in so far, less what was spent.

    Args:
        bytes_per_day: how quickly they come in.
        spent: the file's size.
        age_s: seconds since its first line; both 0 for a new file.
        clock: seconds, from any moment on.
    """

    def __init__(
        self,
        bytes_per_day: float,
        spent: int = 0,
        age_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_s = bytes_per_day / _DAY_S
        self._clock = clock
        left = FIRST_BYTES + age_s * self._per_s - spent
        self._left = min(max(left, _LEAST_BYTES), FIRST_BYTES)
        self._at = clock()

    def spend(self, count: int) -> None:
        """So many bytes were written."""
        self._come_in()
        self._left -= count

    def pause_s(self, count: int) -> float:
        """How long a sample of so many bytes has to wait, in seconds; 0: it may be written as soon as it is due."""
        self._come_in()
        return 0.0 if self._left > _KEPT * FIRST_BYTES else count / self._per_s

    def has_room_for(self, count: int) -> bool:
        """Whether a sample of so many bytes may be written out of turn."""
        self._come_in()
        return self._left > count

    def _come_in(self) -> None:
        now = self._clock()
        self._left = min(self._left + (now - self._at) * self._per_s, FIRST_BYTES)
        self._at = now


def for_file(path: Path, bytes_per_day: float) -> Allowance:
    """What a node's file of samples may still take, written by earlier tries or not at all."""
    try:
        with open_to_read(path) as file:
            began = datetime.fromisoformat(json.loads(file.readline())["time"])
        age_s = (datetime.now(UTC) - began).total_seconds()
        return Allowance(bytes_per_day, path.stat().st_size, max(0.0, age_s))
    except (OSError, ValueError, KeyError, TypeError):  # it isn't there, or begins in some other way
        return Allowance(bytes_per_day)
