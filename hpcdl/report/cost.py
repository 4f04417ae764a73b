"""What a run has cost: what its tries held, for how long, and what of it was lost to faults."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcdl.report.timeline import Span, Try
from hpcdl.runs import words


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Money an hour; null: not said."""

    cpu_hour: float | None = None
    gpu_hour: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one run, or of several together. Hours are those that were allocated, used or not."""

    wall_hours: float = 0.0
    """From each try's start to its end, added up."""
    queued_hours: float = 0.0
    cpu_hours: float = 0.0
    """CPUs × nodes × hours."""
    gpu_hours: float = 0.0
    lost_cpu_hours: float = 0.0
    """Of these, from the last checkpoint before each fault to the fault, and starting again after it."""
    lost_gpu_hours: float = 0.0
    money: float | None = None
    """By the prices that were given; null without."""
    lost_money: float | None = None

    @property
    def lost_share(self) -> float | None:
        """Lost of what was allocated: by GPUs where there are any, else by CPUs."""
        whole, lost = (
            (self.gpu_hours, self.lost_gpu_hours) if self.gpu_hours else (self.cpu_hours, self.lost_cpu_hours)
        )
        return lost / whole if whole else None


def of_tries(tries: Sequence[Try], cluster: Mapping[str, Any], prices: Prices) -> Cost:
    """A run's.

    Args:
        tries: its tries.
        cluster: the section of its spec.yaml: what a node was asked for.
        prices: an hour's.
    """
    cpus = _count(cluster.get("processes_per_node"), 1) * _count(cluster.get("cpus_per_process"), 1)
    gpus = _count(cluster.get("gpus_per_node"), 0)
    node_hours = lost_hours = wall = queued = 0.0
    for number, each in enumerate(tries):
        held = (each.seconds("starting") + each.seconds("running")) / 3600
        again = number > 0 and tries[number - 1].outcome in ("lost", "restarted", "requeued", "failed")
        starts = [span for span in each.spans if span.kind == "starting"]
        # The first start of all has to be paid for without any fault.
        lost = [span for span in each.spans if span.kind == "lost"] + (starts if again else starts[1:])
        wall += held
        queued += each.seconds("queued") / 3600
        node_hours += held * each.nodes
        lost_hours += _together(lost) / 3600 * each.nodes
    return _priced(
        Cost(
            wall_hours=wall,
            queued_hours=queued,
            cpu_hours=node_hours * cpus,
            gpu_hours=node_hours * gpus,
            lost_cpu_hours=lost_hours * cpus,
            lost_gpu_hours=lost_hours * gpus,
        ),
        prices,
    )


def total(costs: Iterable[Cost], prices: Prices) -> Cost:
    """Of several runs."""
    costs = list(costs)
    return _priced(
        Cost(
            wall_hours=sum(cost.wall_hours for cost in costs),
            queued_hours=sum(cost.queued_hours for cost in costs),
            cpu_hours=sum(cost.cpu_hours for cost in costs),
            gpu_hours=sum(cost.gpu_hours for cost in costs),
            lost_cpu_hours=sum(cost.lost_cpu_hours for cost in costs),
            lost_gpu_hours=sum(cost.lost_gpu_hours for cost in costs),
        ),
        prices,
    )


def _together(spans: Iterable[Span]) -> float:
    """Seconds that spans cover; what several cover counts once."""
    covered, until = 0.0, ""
    for span in sorted(spans, key=lambda each: each.start):
        start = max(span.start, until)
        if start < span.end:
            covered += words.between(start, span.end)
            until = span.end
    return covered


def _priced(cost: Cost, prices: Prices) -> Cost:
    if prices.cpu_hour is None and prices.gpu_hour is None:
        return cost
    cpu, gpu = prices.cpu_hour or 0.0, prices.gpu_hour or 0.0
    return dataclasses.replace(
        cost,
        money=cost.cpu_hours * cpu + cost.gpu_hours * gpu,
        lost_money=cost.lost_cpu_hours * cpu + cost.lost_gpu_hours * gpu,
    )


def _count(value: object, least: int) -> int:
    return max(least, value) if isinstance(value, int) and not isinstance(value, bool) else least
