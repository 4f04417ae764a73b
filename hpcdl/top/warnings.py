"""What leaks, lags or fails in a run, in words: from its events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpcdl.runs import failure, status

KINDS = {
    "leak": "LEAK",
    "straggler": "SLOW",
    "hang": "HANG",
    "lost": "LOST",
    "checkpoint_failed": "NO CHECKPOINT",
    "warning": "WARNING",
}
"""The events that are warnings, each with its word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Warning:
    """One thing that somebody should look at."""

    kind: str
    """The event's name."""
    about: str
    """What it is about; a later one of the same kind about the same takes its place."""
    time: str
    """UTC, ISO 8601."""
    text: str

    @property
    def word(self) -> str:
        """Its kind in a word or two."""
        return KINDS[self.kind]


class Warnings:
    """Those of a run's present try, kept up to date as events come."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Warning] = {}

    def take(self, event: Mapping[str, Any]) -> None:
        """An event, in the order of time."""
        kind = str(event.get("event"))
        if kind in ("submitted", *failure.BEGINNINGS):  # what an earlier try had is over
            self._found.clear()
        if kind == "checkpoint":
            self._found.pop(("checkpoint_failed", ""), None)
        if kind == "straggler_over":
            self._found.pop(("straggler", ""), None)
        if kind in KINDS:
            warning = _of_event(kind, event)
            self._found.pop((warning.kind, warning.about), None)  # the newest stands last
            self._found[warning.kind, warning.about] = warning

    def all(self) -> tuple[Warning, ...]:
        """The oldest first."""
        return tuple(self._found.values())


def _of_event(kind: str, event: Mapping[str, Any]) -> Warning:
    about, text = "", str(event.get("message") or event.get("reason") or "")
    if kind == "leak":
        about = f"{event.get('node')} {event.get('process')} {event.get('memory')}"
    elif kind == "straggler":
        text = status.straggler([dict(event)])
    return Warning(kind=kind, about=about, time=str(event.get("time", "")), text=text or kind)
