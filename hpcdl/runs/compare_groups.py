"""Runs that differ in their seed only, as one: their means, the best of them, and whether the others are worse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpcdl.runs.compare_metrics import Metric, front, front_of, parse, usual
from hpcdl.runs.compare_row import Row
from hpcdl.runs.student import Stat, Test, compared, holm, quantile, stat

WEAK = 3
"""Up to so many seeds it is said how little they can show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs of one configuration."""

    rows: tuple[Row, ...]
    """Seed by seed; one run where seeds don't matter."""
    stats: Mapping[str, Stat] = field(default_factory=dict)
    """Each figure over the runs that are done; over those that aren't, where none is."""
    values: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Each figure, by the run's seed (by its place where that is not known)."""
    tests: Mapping[str, Test] = field(default_factory=dict)
    """Against the best group in a metric."""
    best_in: tuple[str, ...] = ()
    """Metrics in which no other group is better, and some are worse."""
    on_front: bool = False
    """Whether it is on the front of `--pareto`."""

    @property
    def row(self) -> Row:
        """What all its runs have in common."""
        return self.rows[0]

    @property
    def done(self) -> int:
        """Runs that have completed."""
        return sum(row.state == "COMPLETED" for row in self.rows)

    def mean(self, metric: str) -> float | None:
        """A figure's mean; None where there is none."""
        found = self.stats.get(metric)
        return None if found is None else found.mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A comparison, judged."""

    metrics: tuple[Metric, ...]
    groups: tuple[Group, ...]
    pareto: tuple[Metric, ...] = ()
    seeds: bool = False
    """Whether a configuration has run with several seeds."""
    asked: bool = False
    """Whether the metrics were named."""

    def best(self, metric: Metric) -> list[Group]:
        """Those that no other is better than; none where all are alike, or nobody knows what is good."""
        return [group for group in self.groups if metric.name in group.best_in]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How the user wants runs to be judged."""

    metric: str | None = None
    """Figures, with commas; None: the usual ones, or those of `pareto`."""
    pareto: str | None = None
    """Figures whose front is looked for, with commas."""
    each: bool = False
    """Every run for itself, whatever its seed."""
    sort: str | None = None
    """What else than the first metric says the order."""


def judge(rows: Sequence[Row], asked: Asked) -> Study:
    """Puts seeds together, finds the best and the front, and tests the others against the best.

    Args:
        rows: as they are sorted.
        asked: by what.

    Raises:
        UsageError: a metric is misspelt, or nobody knows what is good of it.
    """
    pareto = front_of(asked.pareto, rows) if asked.pareto is not None else ()
    metrics = parse(asked.metric, rows) if asked.metric is not None else pareto or usual(rows)
    named = asked.metric is not None or bool(pareto)
    groups = [Group(rows=(row,)) for row in rows] if asked.each else grouped(rows)
    counted = [_counted(group) for group in groups]
    seeds = any(len(group.rows) > 1 for group in counted)
    if asked.sort is None and (seeds or named) and metrics:
        counted = in_order(counted, metrics[0])
    judged = counted
    for metric in metrics:
        judged = _judged(judged, metric)
    if pareto:
        judged = _front(judged, pareto)
    return Study(
        metrics=metrics, groups=tuple(judged), pareto=pareto, seeds=seeds and bool(metrics), asked=named
    )


def grouped(rows: Sequence[Row]) -> list[Group]:
    """Runs of the same experiment but for the seed, together; in the order of their first ones."""
    same: dict[str, list[Row]] = {}
    for row in rows:
        same.setdefault(row.apart_from_seed or row.run_id, []).append(row)
    by_seed = (sorted(runs, key=lambda row: (row.seed is None, row.seed or 0)) for runs in same.values())
    return [Group(rows=tuple(runs)) for runs in by_seed]


def in_order(groups: Sequence[Group], metric: Metric) -> list[Group]:
    """The best first, those without the metric last."""
    having = [group for group in groups if group.mean(metric.name) is not None]
    rest = [group for group in groups if group.mean(metric.name) is None]
    return [*sorted(having, key=lambda group: metric.cost(group.mean(metric.name) or 0.0)), *rest]


def _counted(group: Group) -> Group:
    """With its figures; those of runs that failed early are no figures of the configuration."""
    done = [row for row in group.rows if row.state == "COMPLETED"] or list(group.rows)
    values: dict[str, dict[int, float]] = {}
    for place, row in enumerate(done):
        for name, value in row.figures.items():
            values.setdefault(name, {})[place if row.seed is None else row.seed] = value
    stats = {name: found for name, by_seed in values.items() if (found := stat(list(by_seed.values())))}
    return dataclasses.replace(group, values=values, stats=stats)


def _judged(groups: Sequence[Group], metric: Metric) -> list[Group]:
    """With the best ones of a metric marked, and the others tested against them."""
    if not metric.better:
        return list(groups)
    able = [group for group in groups if group.done and group.mean(metric.name) is not None]
    able = able or [group for group in groups if group.mean(metric.name) is not None]
    if not able:
        return list(groups)
    least = min(metric.cost(group.stats[metric.name].mean) for group in able)
    best = [group for group in able if metric.cost(group.stats[metric.name].mean) == least]
    if len(best) == len(able) > 1:  # the same for all
        return list(groups)
    names = {id(group) for group in best}
    marked = [
        dataclasses.replace(group, best_in=(*group.best_in, metric.name)) if id(group) in names else group
        for group in groups
    ]
    others = [place for place, group in enumerate(groups) if group.done and id(group) not in names]
    return _tested(marked, metric.name, others, best[0].values[metric.name])


def _tested(
    groups: list[Group], metric: str, others: Sequence[int], best: Mapping[int, float]
) -> list[Group]:
    found = {place: compared(dict(groups[place].values.get(metric, {})), dict(best)) for place in others}
    tests = {place: test for place, test in found.items() if test is not None}
    count = len(tests) + 1
    adjusted = holm([test.p for test in tests.values()], count * (count - 1) // 2)
    for (place, test), p in zip(tests.items(), adjusted, strict=True):
        known = {**groups[place].tests, metric: dataclasses.replace(test, adjusted=p)}
        groups[place] = dataclasses.replace(groups[place], tests=known)
    return groups


def _front(groups: Sequence[Group], metrics: Sequence[Metric]) -> list[Group]:
    """With the front marked; of runs that are done, if any are."""
    someone = any(group.done for group in groups)
    points = [
        {name: found.mean for name, found in group.stats.items()} if group.done or not someone else {}
        for group in groups
    ]
    on = set(front(points, metrics))
    return [dataclasses.replace(group, on_front=place in on) for place, group in enumerate(groups)]


def least_seen(seeds: int) -> float:
    """The smallest difference of two means that so many seeds each can show, in standard deviations of one run.

    Without a correction, by Welch's test with equal spreads: t · sqrt(2 / n).
    """
    return quantile(0.975, 2 * (seeds - 1)) * math.sqrt(2 / seeds)


def as_json(group: Group, metrics: Sequence[Metric]) -> dict[str, Any]:
    """One group, every figure of it."""
    config = {key: value for key, value in group.row.config.items() if key != "seed"}
    return {
        "runs": [row.run_id for row in group.rows],
        "seeds": [row.seed for row in group.rows],
        "completed": group.done,
        "config": config,
        "best_in": list(group.best_in),
        "pareto": group.on_front,
        "figures": {name: dataclasses.asdict(found) for name, found in group.stats.items()},
        "against_best": {
            metric.name: dataclasses.asdict(group.tests[metric.name])
            for metric in metrics
            if metric.name in group.tests
        },
    }
