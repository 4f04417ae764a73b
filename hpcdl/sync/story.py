"""A run's files as trackers want them: one row a logged step, and one head and one summary a run.

metrics.jsonl holds no step of a lost try any more (hpcdl.worker.metrics.Metrics.rewind), so the rows are one curve,
however many tries it took. What the nodes measured between two logged steps joins the later one's row.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import yaml

from hpcdl import secrets
from hpcdl.errors import UsageError
from hpcdl.monitor import records
from hpcdl.monitor.records import NodeSample
from hpcdl.runs.store import RunDir
from hpcdl.spec.plain import load_yaml

DIGEST = "hpcdl/digest"
"""Key of the summary that tells what a server has: the digest of all that was sent."""

Fold = Callable[[Sequence[float]], float]


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def last(values: Sequence[float]) -> float:
    """The newest."""
    return values[-1]


OF_NODE: dict[str, Fold] = {
    "cpu_percent": mean,
    "rss_bytes": max,
    "pss_bytes": max,
    "node_cpu_percent": mean,
    "memory_available_bytes": min,
    "net_sent_bytes": last,
    "net_received_bytes": last,
    "rdma_sent_bytes": last,
    "rdma_received_bytes": last,
}
"""What of a node is shown, and how the samples of one row become one number."""
OF_RANK: dict[str, Fold] = {
    "cpu_percent": mean,
    "rss_bytes": max,
    "pss_bytes": max,
    "gpu_memory_bytes": max,
    "threads": max,
    "open_files": max,
}
OF_GPU: dict[str, Fold] = {
    "percent": mean,
    "memory_used_bytes": max,
    "power_w": mean,
    "temperature_c": max,
    "ecc_uncorrected": last,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a run is, known before its first step."""

    run_id: str
    name: str
    group: str
    """The sweep that it is a point of, else the experiment's name."""
    tags: tuple[str, ...]
    project: str
    entity: str | None
    tracker: str
    """As configured: `none`, `wandb`, `tensorboard`."""
    config: dict[str, Any]
    """The experiment, without secrets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One logged step."""

    step: int
    time: float
    """When it was logged, seconds since 1970."""
    values: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """All that is sent of a run."""

    head: Head
    rows: list[Row]
    summary: dict[str, Any]
    digest: str
    """Of the three above."""


@dataclass(slots=True)
class Gatherer:
    """Makes rows of lines and samples that come in the order of their time."""

    _pending: dict[str, list[NodeSample]] = field(default_factory=dict)
    _step: int | None = None
    _time: float = 0.0
    _values: dict[str, float] = field(default_factory=dict)

    def samples(self, found: Iterable[NodeSample]) -> None:
        """What a node measured; the row that they join is told by the time."""
        for sample in found:
            self._pending.setdefault(sample.node, []).append(sample)

    def line(self, record: Mapping[str, Any]) -> Row | None:
        """A line of metrics.jsonl; the row before it, once a greater step begins."""
        step = record.get("step")
        if not isinstance(step, int) or (self._step is not None and step < self._step):
            return None
        done = self._close(self._time) if self._step is not None and step > self._step else None
        self._step = step
        self._time = seconds(record.get("time"), self._time)
        self._values |= _numbers(record)
        return done

    def end(self) -> Row | None:
        """The last row, with everything that was measured since; None where there is nothing at all."""
        if self._step is None:
            if not any(self._pending.values()):
                return None
            self._step = 0
        return self._close(math.inf)

    def _close(self, until: float) -> Row:
        row = Row(step=self._step or 0, time=self._time, values={**self._values, **self._nodes(until)})
        if not row.time:  # a run that never logged a step: its nodes' last look
            row = Row(step=row.step, time=self._latest, values=row.values)
        self._values = {}
        return row

    _latest: float = 0.0

    def _nodes(self, until: float) -> dict[str, float]:
        values: dict[str, float] = {}
        for node in sorted(self._pending):
            waiting = self._pending[node]
            now = [sample for sample in waiting if seconds(sample.time) <= until]
            self._pending[node] = waiting[len(now) :]
            if now:
                self._latest = max(self._latest, seconds(now[-1].time))
                # Samples of a lost try lie between two steps of which only the later one's try counts.
                values |= of_node(node, [sample for sample in now if sample.attempt == now[-1].attempt])
        return values


def of_node(node: str, samples: Sequence[NodeSample]) -> dict[str, float]:
    """Samples as `node/<name>/…`, `node/<name>/rank<r>/…` and `node/<name>/gpu<i>/…`.

    Args:
        node: its name.
        samples: of one row, the oldest first.
    """
    place = f"node/{node}"
    found: dict[str, tuple[Fold, list[float]]] = {}

    def add(under: str, what: Any, kinds: Mapping[str, Fold]) -> None:
        for key, fold in kinds.items():
            value = getattr(what, key)
            if value is not None:
                found.setdefault(f"{under}/{key}", (fold, []))[1].append(value)

    for sample in samples:
        add(place, sample, OF_NODE)
        for process in sample.ranks:
            add(f"{place}/rank{process.rank}", process, OF_RANK)
        for gpu in sample.gpus:
            add(f"{place}/gpu{gpu.index}", gpu, OF_GPU)
    return {key: fold(values) for key, (fold, values) in found.items()}


def tell(run: RunDir) -> Story:
    """All that is there of a run now.

    Raises:
        UsageError: it has no spec.yaml that can be read.
    """
    head, rows, summary = read_head(run), list(rows_of(run)), read_summary(run)
    text = json.dumps([asdict(head), [asdict(row) for row in rows], summary], sort_keys=True, default=str)
    return Story(head=head, rows=rows, summary=summary, digest=hashlib.sha256(text.encode()).hexdigest()[:16])


def prefix(rows: Iterable[Row], last_step: int) -> str:
    """A digest of the metrics of all rows up to a step. What nodes measured may come late and is left out."""
    plain = [
        [row.step, {key: value for key, value in row.values.items() if not key.startswith("node/")}]
        for row in rows
        if row.step <= last_step
    ]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def rows_of(run: RunDir) -> Iterator[Row]:
    """The rows of what is there now, by step."""
    gatherer = Gatherer()
    for node in records.nodes(run):
        gatherer.samples(records.read(run, node))
    lines = [line for line in run.metrics() if isinstance(line.get("step"), int)]
    for line in sorted(
        lines, key=lambda line: int(line["step"])
    ):  # stable: an evaluation stays behind its step
        if (row := gatherer.line(line)) is not None:
            yield row
    if (row := gatherer.end()) is not None:
        yield row


def read_head(run: RunDir) -> Head:
    """What spec.yaml says of the run.

    Raises:
        UsageError: it can't be read.
    """
    try:
        plain = load_yaml(run.spec_file)
        tracker = plain["tracker"]
        name = str(plain["name"])
        return Head(
            run_id=run.path.name,
            name=name,
            group=_sweep_of(run) or name,
            tags=tuple(map(str, tracker.get("tags") or ())),
            project=str(tracker.get("project") or "hpcdl"),
            entity=tracker.get("entity"),
            tracker=str(tracker.get("name")),
            config=without_secrets(plain),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UsageError(f"{run.spec_file}: not an experiment that hpcdl wrote ({error!r})") from error


def read_summary(run: RunDir) -> dict[str, Any]:
    """Numbers and words of result.json, and how the run stands."""
    try:
        result = json.loads(run.result_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        result = {}
    known = (
        {k: v for k, v in result.items() if isinstance(v, int | float | str)}
        if isinstance(result, dict)
        else {}
    )
    try:
        state = run.read_state()
    except FileNotFoundError:
        stands: dict[str, Any] = {}
    else:
        stands = {
            "state": state.state,
            "reason": state.reason,
            "tries": state.attempt + 1,
            "requeues": state.requeues,
            "restarts": state.restarts,
            "nodes": state.nodes,
            "world_size": state.world_size,
        }
    summary: dict[str, Any] = without_secrets({**known, **stands})
    return summary


def without_secrets(plain: Any) -> Any:
    """A config as it may leave this machine: the launcher has refused secrets, and can have missed one."""
    if isinstance(plain, dict):
        return {key: without_secrets(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [without_secrets(value) for value in plain]
    return secrets.hide(secrets.mask(plain)) if isinstance(plain, str) else plain


def seconds(time: Any, default: float = 0.0) -> float:
    """A time as it stands in a run's files, in seconds since 1970."""
    try:
        return datetime.fromisoformat(time).timestamp()
    except (TypeError, ValueError):
        return default


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: value
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _sweep_of(run: RunDir) -> str | None:
    try:
        return str(json.loads((run.path / "sweep.json").read_text(encoding="utf-8"))["sweep"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
