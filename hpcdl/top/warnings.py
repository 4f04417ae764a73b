"""What leaks, lags or fails in a run, in words: from its events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpcdl.runs import words
from hpcdl.runs.judge import clock

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
        kind = event.get("event")
        if kind in ("submitted", "started"):  # what an earlier try had is over
            self._found.clear()
        if kind == "checkpoint":
            self._found.pop(("checkpoint_failed", ""), None)
        if kind == "straggler_over":
            self._found.pop(("straggler", ""), None)
        if kind in KINDS:
            warning = of_event(event)
            self._found.pop((warning.kind, warning.about), None)  # the newest stands last
            self._found[warning.kind, warning.about] = warning

    def all(self) -> tuple[Warning, ...]:
        """The oldest first."""
        return tuple(self._found.values())


def of_event(event: Mapping[str, Any]) -> Warning:
    """An event of KINDS in words."""
    kind = str(event.get("event"))
    about, text = "", str(event.get("message") or event.get("reason") or "")
    if kind == "leak":
        about, text = _leak(event)
    elif kind == "straggler":
        about, text = _straggler(event)
    return Warning(kind=kind, about=about, time=str(event.get("time", "")), text=text or kind)


def _leak(event: Mapping[str, Any]) -> tuple[str, str]:
    process = event.get("process")
    process = process if isinstance(process, Mapping) else {}
    rank, role, pid = process.get("rank"), process.get("role"), process.get("pid")
    who = f"rank {rank}" if rank is not None else f"process {pid}"
    if role not in (None, "rank"):
        who = f"{role} {pid} of {who}" if rank is not None else f"{role} {pid}"
    memory = event.get("memory")
    text = f"{who} on {event.get('node', '?')}: {memory or 'memory'} memory grows"
    rate = event.get("bytes_per_step")
    if isinstance(rate, int | float) and rate > 0:
        text += f" by {_precise(rate)} a step"
    if full := _when(event.get("full_at")):
        text += f", full {full}"
    if grows := _list(event.get("growing")):
        text += f": {grows}"
    return f"{event.get('node')} {role} {pid} {memory}", text


def _precise(count: float) -> str:
    """Bytes with a decimal, which words.size has from GiB on only."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def _straggler(event: Mapping[str, Any]) -> tuple[str, str]:
    ranks = event.get("ranks")
    who = f"rank {event.get('rank', '?')} on {event.get('node', '?')}"
    if isinstance(ranks, list) and len(ranks) > 1:
        who = f"all {len(ranks)} ranks of {event.get('node', '?')}"
    slower, cause, why = event.get("slower_by"), event.get("cause"), event.get("why")
    text = f"{who} slower than the others"
    if isinstance(slower, int | float):
        text = f"{who}: {slower:.2f} times the others' own time"
    text += f", {cause}" if cause else ""
    text += f": {why}" if why else ""
    return "", text


def _when(full_at: object) -> str:
    """A step, or a time, at which memory will be full."""
    if isinstance(full_at, int | float) and not isinstance(full_at, bool):
        return f"at step {full_at:,.0f}"
    return f"about {clock(full_at)}" if isinstance(full_at, str) and words.parse(full_at) else ""


def _list(growing: object) -> str:
    """What grows: a text, or some of which the first is the largest."""
    if isinstance(growing, list) and growing:
        first = growing[0]
        first = first.get("line") or first.get("what") or first if isinstance(first, Mapping) else first
        return f"{first}{f' and {len(growing) - 1} more' if len(growing) > 1 else ''}"
    return growing if isinstance(growing, str) else ""
