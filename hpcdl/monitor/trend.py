"""A robust trend: the slope that half of a series may be wrong about, and how sure it is.

The slope is Theil's (H. Theil, «A rank-invariant method of linear and polynomial regression analysis», Proc. Kon. Ned.
Akad. v. Wetensch. A 53, 1950): the median of the slopes of all pairs of points. Its interval is Sen's (P. K. Sen,
«Estimates of the regression coefficient based on Kendall's tau», J. Am. Stat. Assoc. 63, 1968), from the variance of
Kendall's S under no trend (M. G. Kendall, «Rank Correlation Methods», 1948), which is also the test of H. B. Mann
(«Nonparametric tests against trend», Econometrica 13, 1945). Standard library only: the login node has no numpy.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]
"""Where and how much: a step and bytes."""
MOST = 120
"""Points that are compared with one another: 7,140 pairs. Longer series are thinned by blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """A series' slope."""

    slope: float
    """Median of the slopes of all pairs, in bytes a step."""
    low: float
    """Lower end of the slope's interval."""
    high: float
    tau: float
    """Kendall's: 1 where each later point is higher, 0 without a trend, -1 where each is lower."""
    points: int
    """That were compared."""


def theil_sen(points: Sequence[Point], confidence: float = 0.99) -> Trend:
    """The trend of points, in any order; 0 ± infinity where there are no two places.

    Args:
        points: thinned to `MOST` by blocks' medians where there are more.
        confidence: of the interval, two-sided, below 1.
    """
    points = medians(sorted(points), MOST)
    slopes: list[float] = []
    score = 0
    for index, (x, y) in enumerate(points):
        for further, above in points[index + 1 :]:
            score += (above > y) - (above < y)
            if further > x:
                slopes.append((above - y) / (further - x))
    if not slopes:
        return Trend(slope=0.0, low=-math.inf, high=math.inf, tau=0.0, points=len(points))
    slopes.sort()
    spread = statistics.NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(_variance(points))
    low, high = (len(slopes) - spread) / 2, (len(slopes) + spread) / 2
    return Trend(
        slope=statistics.median(slopes),
        low=slopes[math.floor(low)] if low >= 0 else -math.inf,
        high=slopes[math.ceil(high)] if high <= len(slopes) - 1 else math.inf,
        tau=score / (len(points) * (len(points) - 1) / 2),
        points=len(points),
    )


def _variance(points: Sequence[Point]) -> float:
    """Of Kendall's S where there is no trend; equal values make it less."""
    sizes = [len(points), *(-count for count in Counter(y for _, y in points).values())]
    return sum(math.copysign(1, n) * abs(n) * (abs(n) - 1) * (2 * abs(n) + 5) for n in sizes) / 18


def medians(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many points: blocks of neighbours, the median of each."""
    return [
        (statistics.median(x for x, _ in part), statistics.median(y for _, y in part))
        for part in blocks(points, most)
    ]


def blocks(points: Sequence[Point], most: int) -> list[Sequence[Point]]:
    """Neighbours together, in at most so many groups of like size; none is empty."""
    count = min(most, len(points))
    edges = [round(index * len(points) / count) for index in range(count + 1)] if count else []
    return [points[start:end] for start, end in pairwise(edges)]
