"""Plots as SVG: lines, dots and bands in a square of 1,000 × 1,000 that the page stretches to any width.

Why not plotly: its JavaScript makes every page 4.8 MB, and importing it takes seconds on a login node whose disk is
shared. Here a plot is some kB of paths; colours are the page's own (light, dark, print), lines keep their width however
the square is stretched, and ticks are text beside it that never shrinks. templates/page.js adds the values under the
pointer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hpcdl.report import scale
from hpcdl.report.scale import Scale
from hpcdl.report.series import POINTS, Point, quantiles, thin

SIDE = 1000
COLOURS = 8
"""Kinds of lines that a page tells apart, by colour and dashes."""
MOST_LINES = 6
"""More of one kind are drawn as a band."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a plot, or its dots, or a band."""

    label: str
    points: Sequence[Point]
    style: str = "line"
    """`line`, `dots`, `both`, `band` (from `points` to `upper`)."""
    upper: Sequence[Point] = ()
    colour: int = 1
    """From 1 to COLOURS; 0: grey."""
    dashed: bool = False
    faint: bool = False
    """Whether its dots let others be seen through them."""
    names: Sequence[str] = ()
    """What each dot is; the page says it under the pointer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What an axis shows."""

    label: str
    unit: str = ""
    log: bool = False
    from_zero: bool = False
    words: Sequence[str] = ()
    """Values that are no numbers, at 0, 1, 2, …"""
    few: bool = False
    """Whether it holds some values only, each of which has its tick, and no dot lies on the frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One plot."""

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    events: Sequence[tuple[float, str]] = ()
    """Where something happened: x, and what."""
    levels: Sequence[tuple[float, str]] = ()
    """What to hold against the lines: y, and what it is."""
    note: str = ""


def many(curves: Sequence[tuple[str, Sequence[Point]]], what: str, first_colour: int = 1) -> list[Line]:
    """Several curves of one kind: a line each, or the band they lie in where they are too many for that.

    Args:
        curves: each with its name, in rising x.
        what: what they are: `ranks`.
        first_colour: of the lines.
    """
    curves = [(name, points) for name, points in curves if points]
    if len(curves) <= MOST_LINES:
        return [
            Line(label=name, points=points, colour=(first_colour + number - 1) % COLOURS + 1)
            for number, (name, points) in enumerate(curves)
        ]
    low, middle, high = quantiles([points for _, points in curves], (0.0, 0.5, 1.0))
    name, top = max(curves, key=lambda curve: max(y for _, y in curve[1]))
    return [
        Line(label=f"all {len(curves)} {what}", points=low, upper=high, style="band", colour=first_colour),
        Line(label="median", points=middle, colour=first_colour),
        Line(label=f"highest: {name}", points=top, colour=first_colour % COLOURS + 1),
    ]


def draw(plot: Plot) -> dict[str, Any] | None:
    """The plot as the template has it; None where there is nothing to draw."""
    lines = [line for line in plot.lines if line.points]
    if not lines:
        return None
    points = [point for line in lines for point in (*line.points, *line.upper)]
    x = _scale_x(plot.x, [point[0] for point in points])
    ys = [point[1] for point in points]
    levels = _near(plot.levels, max(ys))
    y = _scale_y(plot.y, [*ys, *(level for level, _ in levels)])
    return {
        "title": plot.title,
        "note": plot.note,
        "alt": _in_words(plot, lines),
        "x": _axis(plot.x, x),
        "y": _axis(plot.y, y),
        "paths": [path for line in lines for path in _paths(line, x, y)],
        "events": [
            {"at": _round(x.share(at) * SIDE), "text": text}
            for at, text in plot.events
            if x.low <= at <= x.high
        ],
        "levels": [{"at": _round((1 - y.share(at)) * SIDE), "text": text} for at, text in levels],
        "legend": [_legend(line) for line in lines] if len(lines) > 1 else [],
    }


def _near(levels: Sequence[tuple[float, str]], highest: float) -> list[tuple[float, str]]:
    """Levels that don't press the lines flat: those far above everything are said in words instead."""
    return [(at, text) for at, text in levels if at <= 4 * highest]


def _scale_x(axis: Axis, values: Sequence[float]) -> Scale:
    if axis.words:
        return Scale(low=-0.5, high=len(axis.words) - 0.5, ticks=tuple(range(len(axis.words))))
    distinct = sorted(set(values))
    if axis.few and len(distinct) <= scale.MOST_TICKS:
        return scale.between(distinct, log=axis.log)
    return scale.along(min(values), max(values), axis.unit, log=axis.log)


def _scale_y(axis: Axis, values: Sequence[float]) -> Scale:
    return scale.over(min(values), max(values), axis.unit, log=axis.log, from_zero=axis.from_zero)


def _axis(axis: Axis, drawn: Scale) -> dict[str, Any]:
    def text(tick: float) -> str:
        return axis.words[int(tick)] if axis.words else scale.written(tick, axis.unit)

    return {
        "label": axis.label,
        "unit": axis.unit,
        "low": drawn.low,
        "high": drawn.high,
        "log": drawn.log,
        "words": list(axis.words),
        "ticks": [{"at": round(100 * drawn.share(tick), 2), "text": text(tick)} for tick in drawn.ticks],
    }


def _paths(line: Line, x: Scale, y: Scale) -> Iterable[dict[str, Any]]:
    common = {
        "colour": line.colour,
        "label": line.label,
        "dashed": line.dashed,
        "faint": line.faint,
        "names": list(line.names),
    }
    if line.style == "band":
        upper = "".join(f"L{each}" for each in _pairs(list(reversed(line.upper)), x, y))
        yield {**common, "style": "band", "d": f"M{' '.join(_pairs(line.points, x, y))}{upper}Z"}
        return
    if line.style in ("line", "both") and len(line.points) > 1:
        yield {**common, "style": "line", "names": [], "d": "M" + " ".join(_pairs(thin(line.points), x, y))}
    if line.style in ("dots", "both") or len(line.points) == 1:
        points = line.points if line.names else thin(line.points, 4 * POINTS)
        yield {**common, "style": "dots", "d": "".join(f"M{each}h0" for each in _pairs(points, x, y))}


def _pairs(points: Sequence[Point], x: Scale, y: Scale) -> list[str]:
    return [f"{_round(x.share(px) * SIDE)} {_round((1 - y.share(py)) * SIDE)}" for px, py in points]


def _round(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _legend(line: Line) -> dict[str, Any]:
    return {"colour": line.colour, "label": line.label, "style": line.style, "dashed": line.dashed}


def _in_words(plot: Plot, lines: Sequence[Line]) -> str:
    """What who can't see the plot is told."""
    shown = []
    for line in lines[:MOST_LINES]:
        first, last = line.points[0], line.points[-1]
        low, high = min(y for _, y in line.points), max(y for _, y in line.points)

        def said(value: float) -> str:
            return scale.written(value, plot.y.unit)

        if line.style == "dots":
            shown.append(f"{line.label}: {len(line.points)} points from {said(low)} to {said(high)}")
        else:
            shown.append(
                f"{line.label}: {said(first[1])} to {said(last[1])}, lowest {said(low)}, highest {said(high)}"
            )
    more = f"; and {len(lines) - MOST_LINES} more" if len(lines) > MOST_LINES else ""
    return f"{plot.title} ({plot.y.label} by {plot.x.label}): {'; '.join(shown)}{more}"
