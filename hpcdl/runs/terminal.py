"""What others have written is shown so that it can't act on the terminal.

A log line, a reason or a name may hold control sequences: they can hide lines, rewrite what is on the screen, or type
commands. On a terminal each control character becomes a mark; files and pipes get what was written.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

MARK = "\N{REPLACEMENT CHARACTER}"
_ACTING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and line end, and those that turn the direction of what follows."""
_COLOURS = re.compile(r"\x1b\[[0-9;:]*m")
_OVERWRITTEN = re.compile(r"[^\n]*\r(?=[^\r\n])")
"""What a progress bar has written over."""


def harmless(text: str) -> str:
    """The text without what acts on a terminal: colours go, and of a progress bar its last state stays."""
    if not _ACTING.search(text):
        return text
    return _ACTING.sub(MARK, _OVERWRITTEN.sub("", _COLOURS.sub("", text)).replace("\r", ""))


def coloured(text: str) -> str:
    """As `line`, but colours stay: what hpcdl on another machine has printed for this terminal."""
    if not sys.stdout.isatty():
        return text
    parts, colours = _COLOURS.split(text), _COLOURS.findall(text)
    return "".join(harmless(part) + colour for part, colour in zip(parts, [*colours, ""], strict=True))


def line(text: str, *, to: IO[str] | None = None) -> str:
    """A line as it may go to a stream: harmless on a terminal, else as it is.

    Args:
        text: the line.
        to: where it goes; None: standard output.
    """
    return harmless(text) if (to or sys.stdout).isatty() else text


def console(**options: Any) -> Console:
    """A rich console that shows on a terminal only what is harmless, whatever it is given.

    Args:
        **options: of rich's Console.
    """
    from rich.console import Console
    from rich.segment import Segment

    class Harmless(Console):
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                # Rich's own sequences are made later, from styles, or are marked as such.
                yield segment if segment.control else Segment(harmless(segment.text), segment.style)

    made = Harmless(**options)
    return made if made.is_terminal else Console(**options)
