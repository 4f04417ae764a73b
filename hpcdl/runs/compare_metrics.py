"""What `--metric` and `--pareto` name: figures of runs, and which of two values is the better one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from hpcdl.errors import UsageError, nearest_name
from hpcdl.runs.compare_row import Row

Better = Literal["min", "max", ""]

ALIASES = {
    "memory": "peak_memory_bytes",
    "comm": "comm_share",
    "eff": "efficiency",
    "perplexity": "eval_perplexity",
    "speed": "tokens_per_s",
    "throughput": "tokens_per_s",
}
"""Other words for a figure."""
UNITS = ("_bytes", "_s")
"""May be left off a name: peak_memory is peak_memory_bytes."""
LARGER = frozenset({"mfu", "efficiency", "accuracy"})
LARGER_ENDS = ("per_s", "per_second", "_accuracy", "_mfu")
SMALLER_ENDS = ("loss", "perplexity", "_s", "_seconds", "_bytes", "_share", "_error")
SMALLER_ENDS_BEFORE = ("_before", "_after")
"""What a result's figures have behind their names."""
QUALITY = ("eval_loss", "loss")
USUAL = ("tokens_per_s", "peak_memory_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A figure, and what is good of it."""

    name: str
    better: Better = ""
    """min: the smaller; max: the larger; empty: nobody knows."""

    @property
    def key(self) -> str:
        """As `--metric` takes it."""
        return f"{self.name}:{self.better}" if self.better else self.name

    def cost(self, value: float) -> float:
        """The smaller, the better."""
        return -value if self.better == "max" else value


def parse(text: str, rows: Iterable[Row], option: str = "--metric") -> tuple[Metric, ...]:
    """The metrics that an option names, with commas.

    Args:
        text: `NAME[:min|:max],…`.
        rows: the runs, whose figures they are.
        option: what is said of it where it is wrong.

    Raises:
        UsageError: no run has such a figure, or something else than min or max stands behind the colon.
    """
    known = sorted({name for row in rows for name in row.figures})
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UsageError(
            f"{option} {text!r}: names no metric; the runs have {', '.join(known) or 'none yet'}"
        )
    return tuple(dict.fromkeys(_one(word, known, option) for word in words))


def front_of(text: str, rows: Iterable[Row]) -> tuple[Metric, ...]:
    """The metrics of `--pareto`: two or more, of each of which it is known what is good.

    Raises:
        UsageError: they aren't.
    """
    metrics = parse(text, rows, "--pareto")
    if len(metrics) < 2:
        raise UsageError(
            f"--pareto {text}: a front is of two metrics or more: --pareto tokens_per_s,peak_memory"
        )
    if unknown := [metric.name for metric in metrics if not metric.better]:
        name = unknown[0]
        raise UsageError(
            f"--pareto {text}: is a small {name} good, or a large one? say {name}:min or {name}:max"
        )
    return metrics


def usual(rows: Sequence[Row]) -> tuple[Metric, ...]:
    """What is compared where nothing is named: quality first, then what it costs."""
    had = {name for row in rows for name in row.figures}
    quality = [name for name in QUALITY if name in had][:1]
    return tuple(Metric(name=name, better=direction(name)) for name in (*quality, *USUAL) if name in had)


def direction(name: str) -> Better:
    """What is good of a figure, as far as its name tells."""
    last = name.rpartition(".")[2]
    for end in SMALLER_ENDS_BEFORE:
        last = last.removesuffix(end)
    if last in LARGER or last.endswith(LARGER_ENDS):
        return "max"
    return "min" if last.endswith(SMALLER_ENDS) else ""


def _one(word: str, known: Sequence[str], option: str) -> Metric:
    name, colon, better = word.partition(":")
    if colon and better not in ("min", "max"):
        near = nearest_name(better, ("min", "max")) or "min"
        raise UsageError(
            f"{option} {word}: {better or 'nothing'} says not which is better\n"
            f"allowed: {name}:min (the smaller), {name}:max (the larger)\nnearest: {name}:{near}"
        )
    found = _called(name, known)
    if found is None:
        near = nearest_name(name, (*known, *ALIASES))
        hint = f"; nearest name: {near}" if near else ""
        raise UsageError(
            f"{option} {word}: no run has such a figure{hint}\nthey have: {', '.join(known) or 'none yet'}"
        )
    return Metric(name=found, better=cast("Better", better) if colon else direction(found))


def _called(name: str, known: Sequence[str]) -> str | None:
    """The figure that is meant; an alias is one also where no run has measured it yet."""
    wanted = (name, *(f"{name}{unit}" for unit in UNITS), *([ALIASES[name]] if name in ALIASES else []))
    return next((each for each in wanted if each in known), None)


def front(points: Sequence[Mapping[str, float]], metrics: Sequence[Metric]) -> list[int]:
    """The points that no other one beats: as good in every metric, and better in one.

    Args:
        points: each point's values; one that lacks any is on no front.
        metrics: what counts.

    Returns:
        Their places, the best in the first metric first. Equal points are all on the front, or none.
    """
    costs = {
        place: tuple(metric.cost(point[metric.name]) for metric in metrics)
        for place, point in enumerate(points)
        if all(metric.name in point for metric in metrics)
    }
    chosen: list[int] = []
    # In this order a point is beaten, if at all, by one on the front that came before it.
    for place in sorted(costs, key=costs.__getitem__):
        if not any(_beats(costs[other], costs[place]) for other in chosen):
            chosen.append(place)
    return chosen


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
