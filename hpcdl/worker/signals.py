"""Asked to stop: a signal on any rank, or the run directory's STOP file. All ranks agree on the step."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from types import FrameType

from hpcdl.runs.store import RunDir

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
LOOK_EVERY_S = 0.2
"""Rank 0 looks for the STOP file at most this often: each look is a round trip on a shared disk."""


class Stop:
    """Remembers what asked this rank to stop; `flags` goes into the collective that ends each step."""

    WIDTH = len(SIGNALS) + 1
    """Flags of one rank: one a signal, one for the STOP file."""

    def __init__(self, run: RunDir, *, watch_file: bool) -> None:
        self._run = run
        self._watch_file = watch_file
        self._looked = 0.0
        self._flags = [0.0] * self.WIDTH
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._flags[SIGNALS.index(signal.Signals(number))] = 1.0

    def flags(self) -> list[float]:
        """This rank's flags, `(WIDTH,)`, 1 where it was asked to stop."""
        now = time.monotonic()
        if self._watch_file and now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            if self._run.stop_file.exists():
                self._flags[-1] = 1.0
        return list(self._flags)

    def reason(self, flags: Sequence[float]) -> str | None:
        """Why to stop, from all ranks' flags added up; None to go on. The STOP file goes before signals.

        Only rank 0's answer is written down: it alone reads the file's word.
        """
        if flags[-1]:
            try:
                words = self._run.stop_file.read_text(encoding="utf-8").split()
            except OSError:
                words = []
            return words[0] if words else "STOP file"
        for number, flag in zip(SIGNALS, flags, strict=False):
            if flag:
                return f"signal {number.name.removeprefix('SIG')}"
        return None
