"""A loss curve in little memory, drawn in one line."""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST = 256
"""Points that are kept at most; of more, every second one goes."""
LARGEST = 1e30
"""A larger loss is drawn as this."""
BLOCKS = "▁▂▃▄▅▆▇█"


class Curve:
    """Points of a run's loss over its steps: few, spread over the whole run, the last one always among them."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, float]] = []
        self._last: tuple[int, float] | None = None
        self._gap = 1

    def add(self, step: int, loss: float | None) -> None:
        """A step's loss; steps from there on that were known before are of a try that was lost."""
        if self._last is not None and step <= self._last[0]:
            self._kept = [point for point in self._kept if point[0] < step]
            self._last = None
        if loss is None or not math.isfinite(loss):
            return
        self._last = (step, min(max(loss, -LARGEST), LARGEST))
        if self._kept and step - self._kept[-1][0] < self._gap:
            return
        self._kept.append(self._last)
        if len(self._kept) > MOST:
            self._kept = self._kept[::2]
            self._gap = max(1, (self._kept[-1][0] - self._kept[0][0]) // len(self._kept))

    def points(self) -> tuple[tuple[int, float], ...]:
        """(step, loss), by step."""
        last = [self._last] if self._last is not None and self._last not in self._kept[-1:] else []
        return (*self._kept, *last)


def sparkline(points: Sequence[tuple[int, float]], width: int) -> str:
    """A line of blocks, the lowest value the lowest block; steps run from left to right.

    Args:
        points: (step, value), by step; finite values.
        width: characters; fewer where there are fewer points.
    """
    if not points or width < 1:
        return ""
    width = min(width, len(points))
    first, span = points[0][0], max(1, points[-1][0] - points[0][0])
    sums = [[0.0, 0] for _ in range(width)]
    for step, value in points:
        place = min(width - 1, (step - first) * width // span)
        sums[place][0] += value
        sums[place][1] += 1
    values: list[float] = []
    for total, count in sums:  # a stretch without a point is as high as the one before
        values.append(total / count if count else values[-1])
    low, high = min(values), max(values)
    top = len(BLOCKS) - 1
    scale = top / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)
