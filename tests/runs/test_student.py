"""Student's t against tables, against scipy where it is there, and against what chance does."""

from __future__ import annotations

import math
import random

import pytest

from hpcdl.runs.student import cdf, compared, holm, quantile, stat, two_sided


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.706204736), (2, 4.302652730), (4, 2.776445105), (9, 2.262157163), (30, 2.042272456)]
)
def test_the_two_sided_five_per_cent_points_of_the_tables(df: int, t: float) -> None:
    assert quantile(0.975, df) == pytest.approx(t, abs=1e-8)
    assert two_sided(t, df) == pytest.approx(0.05, abs=1e-9)
    assert cdf(-t, df) == pytest.approx(0.025, abs=1e-9)
    assert cdf(t, df) == pytest.approx(0.975, abs=1e-9)


def test_one_degree_of_freedom_has_a_closed_form() -> None:
    for t in (0.0, 0.01, 0.7, 3.0, 1e4):
        assert two_sided(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, rel=1e-9)


def test_both_tests_of_four_seeds() -> None:
    """Figures of scipy 1.16."""
    a = {0: 3.1, 1: 3.3, 2: 2.9, 3: 3.05}
    welch = compared(a, {10: 3.6, 11: 3.31, 12: 3.9})
    assert welch is not None and (welch.kind, welch.n) == ("welch", 3)
    assert (welch.p, welch.low, welch.high) == pytest.approx((0.0737925167, -1.1249407042, 0.0932740354))
    paired = compared(a, {0: 3.2, 1: 3.35, 2: 3.1, 3: 3.2})
    assert paired is not None and (paired.kind, paired.n) == ("paired", 4)
    assert paired.p == pytest.approx(0.0304662917) and paired.difference == pytest.approx(-0.125)


@pytest.mark.slow  # scipy's import alone
def test_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = {0: 3.1, 1: 3.3, 2: 2.9, 3: 3.05}, {10: 3.6, 11: 3.31, 12: 3.9}
    welch = compared(a, b)
    assert welch is not None and welch.kind == "welch" and welch.n == 3
    theirs = stats.ttest_ind(list(a.values()), list(b.values()), equal_var=False)
    assert welch.p == pytest.approx(theirs.pvalue, rel=1e-9)
    interval = theirs.confidence_interval(0.95)
    assert (welch.low, welch.high) == pytest.approx((interval.low, interval.high), rel=1e-6)
    c = {0: 3.2, 1: 3.35, 2: 3.1, 3: 3.2}
    paired = compared(a, c)
    assert paired is not None and paired.kind == "paired" and paired.n == 4
    assert paired.p == pytest.approx(stats.ttest_rel(list(a.values()), list(c.values())).pvalue, rel=1e-9)


def test_seeds_that_move_both_alike_are_told_apart_by_pairs_only() -> None:
    """Every seed is worth ±1, the change 0.1: between the groups nothing is seen, within the pairs much."""
    shifts = {0: -1.0, 1: 0.4, 2: 0.9, 3: -0.2, 4: 0.1}
    noise = (0.01, -0.01, 0.0, 0.02, -0.02)
    one = {seed: 3 + shift for seed, shift in shifts.items()}
    other = {seed: value + 0.1 + small for (seed, value), small in zip(one.items(), noise, strict=True)}
    paired = compared(other, one)
    welch = compared({seed + 100: value for seed, value in other.items()}, one)
    assert paired is not None and welch is not None
    assert paired.p < 0.001 and paired.low < 0.1 < paired.high
    assert welch.p > 0.5


def test_nothing_is_said_of_one_seed_or_of_no_spread() -> None:
    assert stat([]) is None
    one = stat([3.0])
    assert one is not None and (one.n, one.mean, one.sd, one.low) == (1, 3.0, None, None)
    assert compared({0: 3.0}, {0: 4.0}) is None
    assert compared({0: 3.0, 1: 3.1}, {0: 4.0}) is None
    assert compared({0: 3.0, 1: 3.0}, {0: 4.0, 1: 4.0}) is None
    assert compared({0: 3.0, 1: 3.0}, {2: 4.0, 3: 4.0}) is None


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    dice = random.Random(3)
    held = 0
    for _ in range(2000):
        found = stat([dice.gauss(7, 2) for _ in range(3)])
        assert found is not None and found.low is not None and found.high is not None
        held += found.low <= 7 <= found.high
    assert 0.935 < held / 2000 < 0.965


def test_holm_goes_down_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03], 3) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.001], 10) == pytest.approx([1.0, 0.01])
    assert holm([], 0) == []


def test_of_configurations_that_are_alike_none_is_called_worse_than_the_best() -> None:
    """More often than by chance, that is. A correction for k - 1 comparisons alone gives one in ten here."""
    dice = random.Random(5)
    wrong = 0
    for _ in range(250):
        groups = [{100 * i + seed: dice.gauss(0, 1) for seed in range(5)} for i in range(10)]
        best = min(groups, key=lambda group: sum(group.values()))
        tests = [compared(group, best) for group in groups if group is not best]
        wrong += min(holm([test.p for test in tests if test is not None], 45)) < 0.05
    assert wrong / 250 < 0.06
