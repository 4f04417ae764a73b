"""Which node had which ranks, how they did, and what was measured on them over time."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpcdl.monitor import records
from hpcdl.monitor.records import NodeSample
from hpcdl.report.series import Point, number
from hpcdl.report.timeline import FAULTS, Try, said
from hpcdl.runs import words
from hpcdl.runs.store import RunDir

SAMPLES = 400
"""Samples of a node that a page reads at most."""


@dataclass(slots=True, kw_only=True)
class Node:
    """One node of the run."""

    node: str
    ranks: list[int] = field(default_factory=list)
    """Those that it had in its last try."""
    tries: list[str] = field(default_factory=list)
    in_last_try: bool = False
    lost: bool = False
    """Whether a fault has taken it away, or ended what ran on it."""
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    samples: int = 0
    cpu_percent: float | None = None
    """Of one core, over the run's processes: the mean."""
    rss_bytes: int | None = None
    """Highest sum over the run's processes."""
    memory_limit_bytes: int | None = None
    memory_available_bytes: int | None = None
    """Lowest."""
    gpus: int = 0
    gpu: str = ""
    gpu_percent: float | None = None
    """Mean over time and GPUs."""
    gpu_memory_bytes: int | None = None
    """Highest of any GPU."""
    gpu_memory_total_bytes: int | None = None
    sent_bytes: int | None = None
    received_bytes: int | None = None
    rank_rss_bytes: dict[int, int] = field(default_factory=dict)
    """Highest of each rank."""
    rank_cpu_percent: dict[int, float] = field(default_factory=dict)
    """Mean of each rank."""


@dataclass(slots=True, kw_only=True)
class Curve:
    """What one node or rank showed over time."""

    what: str
    """`rss_bytes`, `cpu_percent`, `gpu_percent`, `gpu_memory_bytes`, `net_bytes_per_s`."""
    node: str
    rank: int | None = None
    """Null: the node's own."""
    points: list[Point] = field(default_factory=list)
    """Seconds since the run's first start, and the value."""


def read(
    run: RunDir, tries: Sequence[Try], events: Sequence[Mapping[str, Any]], per_node: int
) -> tuple[list[Node], list[Curve]]:
    """The nodes, those of the last try first, and their curves.

    Args:
        run: the run.
        tries: its tries.
        events: of events.jsonl.
        per_node: processes on a node, as the spec has it.
    """
    nodes = _of_tries(tries, per_node)
    start = words.parse(next((each.started for each in tries if each.started), None))
    curves: list[Curve] = []
    for name in dict.fromkeys((*nodes, *records.nodes(run))):
        node = nodes.setdefault(name, Node(node=name))
        samples = list(records.read(run, name, at_most=SAMPLES))
        _summarise(node, samples)
        begin = start or words.parse(samples[0].time if samples else None)
        if begin is not None:
            curves += _curves(name, [(_seconds(begin, each), each) for each in samples])
    _tell(nodes, events)
    return sorted(nodes.values(), key=lambda node: not node.in_last_try), curves


def _of_tries(tries: Sequence[Try], per_node: int) -> dict[str, Node]:
    nodes: dict[str, Node] = {}
    started = [each for each in tries if each.started]
    for each in started:
        for name in each.node_list:
            node = nodes.setdefault(name, Node(node=name))
            node.tries.append(each.number)
            # Of several nodes torchrun numbers the ranks as they come: only samples know.
            node.ranks = list(range(per_node)) if len(each.node_list) == 1 else []
            node.in_last_try = each is started[-1]
    return nodes


def _summarise(node: Node, samples: Sequence[NodeSample]) -> None:
    node.samples = len(samples)
    node.cpu_percent = _mean(each.cpu_percent for each in samples)
    node.rss_bytes = _most(each.rss_bytes for each in samples)
    node.memory_limit_bytes = _most(each.memory_limit_bytes for each in samples)
    free = [each.memory_available_bytes for each in samples if each.memory_available_bytes is not None]
    node.memory_available_bytes = min(free, default=None)
    gpus = [gpu for each in samples for gpu in each.gpus]
    node.gpus = len({(gpu.index, gpu.mig) for gpu in gpus})
    node.gpu = next((gpu.name for gpu in gpus if gpu.name), "")
    node.gpu_percent = _mean(gpu.percent for gpu in gpus)
    node.gpu_memory_bytes = _most(gpu.memory_used_bytes for gpu in gpus)
    node.gpu_memory_total_bytes = _most(gpu.memory_total_bytes for gpu in gpus)
    node.sent_bytes = _most(_sum(each.net_sent_bytes, each.rdma_sent_bytes) for each in samples)
    node.received_bytes = _most(_sum(each.net_received_bytes, each.rdma_received_bytes) for each in samples)
    ranks: dict[int, list[records.ProcessSample]] = {}
    for each in samples:
        if each.attempt == samples[-1].attempt:  # another try may have placed them otherwise
            for process in each.ranks:
                ranks.setdefault(process.rank or 0, []).append(process)
    for rank, seen in sorted(ranks.items()):
        if (most := _most(process.rss_bytes for process in seen)) is not None:
            node.rank_rss_bytes[rank] = most
        if (mean := _mean(process.cpu_percent for process in seen)) is not None:
            node.rank_cpu_percent[rank] = mean
    node.ranks = sorted(ranks) or node.ranks


_OF_NODE: dict[str, Callable[[NodeSample], float | None]] = {
    "rss_bytes": lambda each: each.rss_bytes,
    "cpu_percent": lambda each: each.cpu_percent,
    "gpu_percent": lambda each: _mean(gpu.percent for gpu in each.gpus),
    "gpu_memory_bytes": lambda each: _most(gpu.memory_used_bytes for gpu in each.gpus),
}


def _curves(name: str, samples: Sequence[tuple[float, NodeSample]]) -> list[Curve]:
    curves = [
        Curve(what=what, node=name, points=[(at, y) for at, each in samples if (y := take(each)) is not None])
        for what, take in _OF_NODE.items()
    ]
    curves.append(Curve(what="net_bytes_per_s", node=name, points=_rates(samples)))
    ranks: dict[tuple[str, int], list[Point]] = {}
    for at, each in samples:
        for process in each.ranks:
            for what in ("rss_bytes", "cpu_percent"):
                if (value := getattr(process, what)) is not None:
                    ranks.setdefault((what, process.rank or 0), []).append((at, value))
    curves += [
        Curve(what=what, node=name, rank=rank, points=points) for (what, rank), points in ranks.items()
    ]
    return [curve for curve in curves if curve.points]


def _rates(samples: Sequence[tuple[float, NodeSample]]) -> list[Point]:
    """Bytes a second, sent and received together, from one sample to the next."""
    totals = [
        (at, total, each.attempt)
        for at, each in samples
        if (
            total := _sum(
                each.net_sent_bytes, each.net_received_bytes, each.rdma_sent_bytes, each.rdma_received_bytes
            )
        )
        is not None
    ]
    return [
        (at, (total - before) / (at - since))
        for (since, before, old), (at, total, new) in itertools.pairwise(totals)
        if at > since and total >= before and old == new  # a new agent counts from 0
    ]


def _tell(nodes: dict[str, Node], events: Sequence[Mapping[str, Any]]) -> None:
    """Events that name a node, or a rank of one, are told of it."""
    of_rank = {rank: node for node in nodes.values() if node.in_last_try for rank in node.ranks}
    for event in events:
        kind = str(event.get("event", ""))
        named = [event.get("node"), *_list(event.get("nodes")), *_list(event.get("exclude"))]
        found = {id(nodes[str(name)]): nodes[str(name)] for name in named if str(name) in nodes}
        told = f"{event.get('message') or ''} {event.get('reason') or ''}"
        if not found and kind in (*FAULTS, "warning"):
            found = {id(node): node for name, node in nodes.items() if f"node {name}" in told}
        if not found and kind not in FAULTS:
            ranks = [event.get("rank"), *_list(event.get("ranks"))]
            found = {
                id(of_rank[rank]): of_rank[rank]
                for rank in ranks
                if isinstance(rank, int) and rank in of_rank
            }
        for node in found.values():
            if kind in FAULTS:
                node.faults.append(said(event))
                node.lost = node.lost or not node.in_last_try
            elif kind in ("warning", "straggler", "leak"):
                node.warnings.append(said(event))


def _seconds(begin: Any, sample: NodeSample) -> float:
    at = words.parse(sample.time)
    return (at - begin).total_seconds() if at else 0.0


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _most(values: Iterable[Any]) -> Any:
    return max((value for value in values if number(value) is not None), default=None)


def _sum(*values: int | None) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
