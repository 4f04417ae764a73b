"""Student's t for a handful of seeds: intervals, Welch's test, the paired test, Holm's correction.

By the standard library: scipy would be this module's only use of it on a login node, and its import takes longer than
a whole `hpcdl compare`. Exact tests by permutation need no assumption, but have nothing to say of so few figures: of
five paired seeds the smallest possible p is 1/16. The t tests assume that a metric scatters about normally over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

LEVEL = 0.95
"""Of intervals; a p below 1 - LEVEL is called a difference."""
_TINY = 1e-300


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """A metric over the seeds of one configuration."""

    n: int
    mean: float
    sd: float | None = None
    """Of the sample (n - 1); None with one seed."""
    low: float | None = None
    high: float | None = None
    """95 % interval of the mean; None with one seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """One configuration against another."""

    kind: Literal["paired", "welch"]
    """paired: by seed, as both have the same ones."""
    n: int
    """Pairs, or seeds of the smaller group."""
    difference: float
    """Of the means: this one less the other."""
    low: float
    high: float
    """95 % interval of the difference, of this comparison alone."""
    p: float
    """Two-sided, of this comparison alone."""
    adjusted: float
    """After Holm's correction."""


def cdf(t: float, df: float) -> float:
    """P(T <= t) of Student's distribution with `df` degrees of freedom."""
    tail = 0.5 * _beta(df / (df + t * t), df / 2, 0.5)
    return 1 - tail if t > 0 else tail


def two_sided(t: float, df: float) -> float:
    """P(|T| >= |t|)."""
    return _beta(df / (df + t * t), df / 2, 0.5)


@cache
def quantile(p: float, df: float) -> float:
    """The t that a share `p` (above 0.5) lies below; by Newton's method, which comes near it from one side."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    t = 0.0
    for _ in range(100):
        step = (p - cdf(t, df)) * (1 + t * t / df) ** ((df + 1) / 2) / scale
        t += step
        if abs(step) < 1e-9 * t:
            break
    return t


def _beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function, by its continued fraction (Lentz; Numerical Recipes 6.4)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(1 - x, b, a)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    c, d = 1.0, 1 / _apart(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 500):
        for factor in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 / _apart(1 + factor * d), _apart(1 + factor / c)
            value *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return front * value / a


def _apart(value: float) -> float:
    """The value, kept from 0, which it is divided by."""
    return value if abs(value) > _TINY else _TINY


def stat(values: Sequence[float]) -> Stat | None:
    """Mean, spread and interval; None of nothing."""
    if not values:
        return None
    mean, n = math.fsum(values) / len(values), len(values)
    if n == 1:
        return Stat(n=1, mean=mean)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = quantile((1 + LEVEL) / 2, n - 1) * sd / math.sqrt(n)
    return Stat(n=n, mean=mean, sd=sd, low=mean - half, high=mean + half)


def compared(ours: dict[int, float], theirs: dict[int, float]) -> Test | None:
    """One configuration's metric against another's, by seed: paired where the seeds are the same, else Welch's test.

    None where nothing can be said: one seed only, or no spread at all.
    """
    if len(ours) < 2 or len(theirs) < 2:
        return None
    if ours.keys() == theirs.keys():
        pairs = stat([ours[seed] - theirs[seed] for seed in ours])
        assert pairs is not None and pairs.sd is not None
        return _test("paired", pairs.n, pairs.mean, pairs.sd / math.sqrt(pairs.n), pairs.n - 1)
    a, b = stat(list(ours.values())), stat(list(theirs.values()))
    assert a is not None and a.sd is not None and b is not None and b.sd is not None
    own, other = a.sd**2 / a.n, b.sd**2 / b.n
    error = math.sqrt(own + other)
    df = (own + other) ** 2 / (own**2 / (a.n - 1) + other**2 / (b.n - 1)) if error else 1.0
    return _test("welch", min(a.n, b.n), a.mean - b.mean, error, df)


def _test(
    kind: Literal["paired", "welch"], n: int, difference: float, error: float, df: float
) -> Test | None:
    if error <= 1e-12 * abs(difference) or not math.isfinite(df):
        return None
    p, half = two_sided(difference / error, df), quantile((1 + LEVEL) / 2, df) * error
    low, high = difference - half, difference + half
    return Test(kind=kind, n=n, difference=difference, low=low, high=high, p=p, adjusted=p)


def holm(values: Sequence[float], family: int) -> list[float]:
    """Holm's step-down correction.

    Args:
        values: the p of each comparison that was made.
        family: comparisons that might have been made. Against the best of k it is every pair, k (k - 1) / 2: which
            one is the best was told by the same figures, and whichever had come out best would have been compared.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, values[index] * (family - rank)))
        adjusted[index] = highest
    return adjusted
