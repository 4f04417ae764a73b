"""Curves: read from a run's files, thinned out to what a plot can show."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from hpcdl.runs.private import open_to_read

Point = tuple[float, float]

POINTS = 500
"""Points that a curve of a page has at most: about one a pixel."""
WHOLE_BYTES = 1 << 18
"""Up to this size a file is read whole where a sample of its lines would do: that is quicker than many seeks."""
_WINDOW = 4096


def number(value: object) -> float | None:
    """A finite number, or None."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None  # type: ignore[return-value]


def curve(lines: Iterable[Mapping[str, Any]], key: str, by: str = "step") -> list[Point]:
    """The points of one key; lines that lack it, or hold no finite number, are left out."""
    pairs = ((number(line.get(by)), number(line.get(key))) for line in lines)
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def thin(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """At most so many of the points, in their order: of each stretch the lowest and the highest.

    What stands out stays: a spike of one step is seen among a million. The first and the last are kept.
    """
    if len(points) <= most:
        return list(points)
    inner = points[1:-1]
    stretches = max(1, (most - 2) // 2)
    kept: list[Point] = [points[0]]
    for number in range(stretches):
        part = range(number * len(inner) // stretches, (number + 1) * len(inner) // stretches)
        low = min(part, key=lambda place: inner[place][1])
        high = max(part, key=lambda place: inner[place][1])
        kept += [inner[place] for place in sorted({low, high})]
    return [*kept, points[-1]]


def sampled(path: Path, count: int) -> list[dict[str, Any]]:
    """Some lines of a JSON-lines file, spread over it evenly; the first and the last whole ones among them.

    A sweep's page shows a thousand curves: of each it reads `count` places and no more.
    """
    try:
        with open_to_read(path) as file:
            lines = _some_lines(file, count)
    except OSError:
        return []
    return [record for record in _parsed(lines) if isinstance(record, dict)]


def _some_lines(file: IO[bytes], count: int) -> list[bytes]:
    size = os.fstat(file.fileno()).st_size
    if size <= WHOLE_BYTES:
        lines = file.read().rpartition(b"\n")[0].split(b"\n")
        chosen = {place * (len(lines) - 1) // (count - 1) for place in range(count)}
        return [lines[place] for place in sorted(chosen)]
    found: list[bytes] = []
    for place in range(count):
        file.seek(place * size // count)
        window = file.read(_WINDOW)
        first = (window if place == 0 else window.partition(b"\n")[2]).partition(b"\n")
        found += [first[0]] if first[1] else []
    file.seek(-_WINDOW, os.SEEK_END)
    found.append(file.read().rpartition(b"\n")[0].rpartition(b"\n")[2])
    return list(dict.fromkeys(found))


def _parsed(lines: Sequence[bytes]) -> list[Any]:
    """Each line's value, all at once where each is whole: that takes half the time."""
    try:
        together = json.loads(b"[%s]" % b",".join(lines))
    except ValueError:
        together = []
    if len(together) == len(lines):
        return list(together)
    values = []
    for line in lines:
        with contextlib.suppress(ValueError):
            values.append(json.loads(line))
    return values


def quantiles(
    curves: Sequence[Sequence[Point]], shares: Sequence[float], most: int = 100
) -> list[list[Point]]:
    """Of many curves, one a share: 0.5 is the median of what the curves say near each x.

    Args:
        curves: each in rising x.
        shares: from 0 to 1.
        most: places along x.
    """
    xs = [x for points in curves for x, _ in points]
    if not xs:
        return [[] for _ in shares]
    low, high = min(xs), max(xs)
    width = (high - low) / most or 1.0
    places: dict[int, list[list[float]]] = {}
    for points in curves:
        own: dict[int, list[float]] = {}
        for x, y in points:
            own.setdefault(min(most - 1, int((x - low) / width)), []).append(y)
        for place, values in own.items():
            places.setdefault(place, []).append(values)
    lines: list[list[Point]] = [[] for _ in shares]
    for place in sorted(places):
        # A curve counts once at a place, however many points it has there.
        values = sorted(sum(each) / len(each) for each in places[place])
        for line, share in zip(lines, shares, strict=True):
            line.append((low + (place + 0.5) * width, _at(values, share)))
    return lines


def _at(values: Sequence[float], share: float) -> float:
    place = share * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])
