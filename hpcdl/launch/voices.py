"""torchrun's output taken apart into whole lines, each with who said it.

torchrun passes on what its workers print as it finds it in their files: a line that has no end yet comes in pieces,
each under a header of its own, between pieces of other ranks and torchrun's own words. A mark that nobody prints
stands before each header, so that pieces can be told from text and put together again, rank by rank.
"""

from __future__ import annotations

import re
import time

MARK = b"\x1e"
"""ASCII's record separator."""
PREFIX = MARK.decode() + "[rank ${rank}] "
"""torchrun's template for the begin of what it passes on; ${rank} is the global rank."""
PATIENCE_S = 5.0
"""After that a line without an end is shown as it is: a question that nobody will answer, a hang's last words."""
_HEADER = re.compile(rb"\[rank \d+\] ")
_LONGEST_HEADER = 20
_RECORD = re.compile(
    rb"[VIWEF]\d{4} \d\d:\d\d:\d\d\.\d+ \d+ (torch|[^ ]*/torch)/distributed/(run|launcher|elastic)"
)
"""How a line of torchrun's own begins; it knows nothing of a worker's line that has no end."""


class Voices:
    """Takes bytes as they come, gives lines as they are whole: `[rank 3] text`, or torchrun's own words."""

    def __init__(self) -> None:
        self._rest = b""
        """A mark whose header isn't whole yet."""
        self._speaker = b""
        self._begun: dict[bytes, tuple[bytes, float]] = {}
        """Lines that have no end yet, and since when, by speaker."""

    def take(self, data: bytes) -> list[bytes]:
        """The lines that are whole now."""
        first, *marked = (self._rest + data).split(MARK)
        self._rest = b""
        lines = self._hear(first)
        for number, piece in enumerate(marked, start=1):
            header = _HEADER.match(piece)
            if header is not None:
                self._speaker = header.group()
                lines += self._hear(piece[header.end() :])
            elif number == len(marked) and len(piece) < _LONGEST_HEADER and b"\n" not in piece:
                self._rest = MARK + piece
            else:  # somebody does print it
                lines += self._hear(MARK + piece)
        return lines

    def late(self) -> list[bytes]:
        """Lines that have waited for their end for PATIENCE_S."""
        since = time.monotonic() - PATIENCE_S
        return [self._end(speaker) for speaker, (_, begun) in list(self._begun.items()) if begun < since]

    def end(self) -> list[bytes]:
        """What is left: nothing more will come."""
        lines = self._hear(self._rest)
        self._rest = b""
        return lines + [self._end(speaker) for speaker in list(self._begun)]

    def _hear(self, text: bytes) -> list[bytes]:
        lines = []
        while text:
            own = _RECORD.search(text) if self._speaker else None
            line, end, after = text.partition(b"\n")
            if (own is not None and 0 < own.start() < len(line)) or (
                own and not own.start() and self._is_open()
            ):
                self._add(text[: own.start()])
                self._speaker, text = b"", text[own.start() :]
                continue
            self._add(line)
            if end:
                lines.append(self._end(self._speaker))
                self._speaker = b""  # what follows without a header is torchrun's
            text = after
        return lines

    def _is_open(self) -> bool:
        return self._speaker in self._begun

    def _add(self, text: bytes) -> None:
        before, since = self._begun.get(self._speaker, (b"", time.monotonic()))
        self._begun[self._speaker] = (before + text, since)

    def _end(self, speaker: bytes) -> bytes:
        text, _ = self._begun.pop(speaker, (b"", 0.0))
        return speaker + text
