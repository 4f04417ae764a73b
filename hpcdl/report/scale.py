"""Axes: where their ticks stand, and how numbers are written beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BYTES = "bytes"
BYTES_PER_S = "bytes/s"
SECONDS = "s"
"""Units that are written in their own way; others stand behind the number as they are."""
MOST_TICKS = 8
"""On an axis that shows each of its values."""
_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


def written(value: float, unit: str = "") -> str:
    """A value as it stands beside an axis or in a table: `12.5k`, `1.5 GiB`, `1m 30s`, `85 %`."""
    if unit == BYTES:
        return _size(value)
    if unit == BYTES_PER_S:
        return f"{_size(value)}/s"
    if unit == SECONDS:
        return time(value)
    if unit == "%":
        return f"{_trim(value)} %"
    if unit == "step":
        return f"{value:,.0f}"
    return _si(value)


def value(given: Any) -> str:
    """A config's value as YAML has it."""
    if given is None:
        return "null"
    if isinstance(given, bool):
        return str(given).lower()
    if isinstance(given, float):
        return f"{given:g}"
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{_trim(count, 3 if abs(count) < 1000 else 4)} {unit}"
        count /= 1024
    return f"{_trim(count, 3)} TiB"


def time(seconds: float) -> str:
    """`150 ms`, `1.5 s`, `2m 30s`, `3h 05m`, `2d 4h`."""
    size = abs(seconds)
    if size < 60:
        return _trim_to(seconds, "s") if size >= 1 or size == 0 else f"{_trim(seconds * 1000)} ms"
    whole = round(seconds)
    for big, small, name, other in ((86400, 3600, "d", "h"), (3600, 60, "h", "m"), (60, 1, "m", "s")):
        if size >= big:
            rest = abs(whole) % big // small
            return f"{int(whole / big)}{name} {rest}{other}" if rest else f"{int(whole / big)}{name}"
    return f"{whole} s"


def _si(value: float) -> str:
    if value == 0:
        return "0"
    size = abs(value)
    if 1e-4 < size < 1000:
        return _trim(value)
    factor, prefix = next(((f, p) for f, p in _SI if size >= f * 0.9995), _SI[-1])
    if size < 1:  # a learning rate: 3e-4 is read more easily than 300 µ
        return f"{value:.3g}".replace("e-0", "e-")
    return f"{_trim(value / factor)}{prefix}"


def _trim(value: float, digits: int = 4) -> str:
    """So many digits that count, without zeros that don't."""
    return f"{float(f'{value:.{digits}g}'):.12f}".rstrip("0").rstrip(".") or "0"


def _trim_to(value: float, unit: str) -> str:
    return f"{_trim(value)} {unit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """One axis: what lies at its beginning and its end, and its ticks."""

    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] = ()

    def share(self, value: float) -> float:
        """Where a value lies between the ends, from 0 to 1."""
        low, high, at = (self._plain(each) for each in (self.low, self.high, value))
        return min(1.0, max(0.0, (at - low) / (high - low)))

    def _plain(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value


def over(
    low: float, high: float, unit: str = "", *, log: bool = False, from_zero: bool = False, most: int = 5
) -> Scale:
    """The axis that shows these values.

    Args:
        low: the least of them.
        high: the largest.
        unit: of the values: it decides which ticks are round.
        log: by powers of ten; values must be above 0.
        from_zero: begins at 0, where no value is below.
        most: ticks.
    """
    if log and low > 0 and high / low >= 3:
        return _log(low, high, most)
    if from_zero and low >= 0:
        low = 0.0
    if high - low <= abs(high) * 1e-9:
        low, high = (low * 0.9, high * 1.1) if high > 0 else (low - 0.5, high + 0.5)
        low = 0.0 if from_zero and high > 0 else low
    step = _step((high - low) / max(1, most - 1), unit)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(number * step for number in range(first, last + 1))
    return Scale(low=ticks[0], high=ticks[-1], ticks=ticks)


def along(low: float, high: float, unit: str = "", *, log: bool = False, most: int = 5) -> Scale:
    """The axis whose ends are the values' own: for steps and times."""
    if log and low > 0 and high / low >= 3:
        return _log(low, high, most)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    step = _step((high - low) / max(1, most - 1), unit)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Scale(low=low, high=high, ticks=tuple(number * step for number in range(first, last + 1)))


def between(values: Sequence[float], *, log: bool = False) -> Scale:
    """The axis of a few values: a tick at each, and some room beside the outer ones.

    Args:
        values: different ones, rising.
        log: by powers of ten; values must be above 0.
    """
    low, high = values[0], values[-1]
    log = log and low > 0 and high > low
    if log:
        margin = (high / low) ** 0.08
        return Scale(low=low / margin, high=high * margin, log=True, ticks=_apart(values, log=True))
    margin = 0.08 * (high - low) or abs(low) * 0.5 or 0.5
    return Scale(low=low - margin, high=high + margin, ticks=_apart(values, log=False))


def _apart(values: Sequence[float], *, log: bool) -> tuple[float, ...]:
    """Those of the values whose ticks don't stand in each other's way."""
    places = [math.log10(value) if log else value for value in values]
    width = (places[-1] - places[0]) / (MOST_TICKS + 1)
    kept = [0]
    for place in range(1, len(values)):
        if places[place] - places[kept[-1]] >= width:
            kept.append(place)
    return tuple(values[place] for place in kept)


def _log(low: float, high: float, most: int) -> Scale:
    decades = math.log10(high / low)
    steps: tuple[int, ...] = (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 2.5 else (1,)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / most)) if steps == (1,) else 1
    ticks = [each * 10.0**power for power in range(first, last + 1, every) for each in steps]
    inside = tuple(tick for tick in ticks if low * 0.999 <= tick <= high * 1.001)
    margin = (high / low) ** 0.04
    return Scale(low=low / margin, high=high * margin, log=True, ticks=inside or (low, high))


def _step(least: float, unit: str) -> float:
    """The next round distance of ticks."""
    if unit in (BYTES, BYTES_PER_S):
        power = 1024.0 ** max(0, math.floor(math.log(max(least, 1.0), 1024)))
        steps: tuple[float, ...] = tuple(2.0**power for power in range(11))
        return next(step * power for step in steps if step * power >= least * 0.999)
    if unit == SECONDS and least > 10:
        times = (15, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
        found = next((each for each in times if each >= least), None)
        return float(found) if found else math.ceil(least / 86400) * 86400.0
    power = 10.0 ** math.floor(math.log10(least))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= least * 0.999)
    return max(1.0, step) if unit in ("step", "count") else step
