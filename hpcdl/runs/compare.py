"""`hpcdl compare`: runs side by side. Here they are collected into rows; compare_view.py and compare_plot.py
show them.

    collect   runs and sweeps → rows, the keys that differ, the points that were refused
    scaled    rows → the same with their scaling efficiency
    ordered   rows → the same, the best first
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hpcdl.experiment.identity import identifying
from hpcdl.runs import failure, query
from hpcdl.runs.files import last_line, read_lines
from hpcdl.runs.reconcile import View, read, reconcile
from hpcdl.runs.scheduler import Slurm
from hpcdl.runs.store import RunDir
from hpcdl.spec.parallel import DIMENSIONS, ParallelDims, ParallelSpec
from hpcdl.spec.plain import load_yaml

LEADERS = ("parallel.name", "model.name", "data.kind", "peft.name", "optim.name", "task.name")
"""Keys that choose a file of a group: what follows from them in their section is no difference of its own."""
OWN_COLUMNS = ("parallel.name", "cluster.nodes", "cluster.processes_per_node")
"""Keys that every comparison shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A point of a sweep that can't be, and was never submitted."""

    overrides: str
    """What tells it from the sweep's other points."""
    reason: str
    """The first fault, in one line."""
    faults: tuple[Mapping[str, str], ...] = ()
    """All of them, as hpcdl.errors.Fault has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run: what it is and what it has measured. None: not measured, or not yet."""

    run_id: str
    name: str
    run_dir: str
    state: str
    reason: str
    strategy: str
    degrees: Mapping[str, int]
    """The mesh's dimensions that are shared by more than one rank."""
    nodes: int
    processes_per_node: int
    processes: int
    """World size."""
    cpus_per_process: int = 1
    gpus_per_node: int = 0
    started: str | None = None
    ended: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    """The keys that differ between the runs, dotted, and this run's values."""
    scales_with: str = ""
    """The same for runs that differ in their cluster and degrees only."""
    step: int = 0
    max_steps: int = 0
    tokens_per_s: float | None = None
    """Over all ranks: mean over the logged steps, the first left out (it warms up)."""
    step_s: float | None = None
    """Seconds a step, the same mean."""
    efficiency: float | None = None
    """Tokens/s a process, over that of the run `baseline`."""
    baseline: str | None = None
    """Run id of the smallest world that differs in its cluster and degrees only; its own, if it is that."""
    peak_memory_bytes: int | None = None
    """Highest of any rank."""
    node_memory_bytes: int | None = None
    """Highest of any node, over its workers; sampled, and so a lower bound."""
    comm_s: float | None = None
    """Seconds a step with a collective under way, on the slowest rank."""
    comm_bytes: float | None = None
    """Bytes in collectives a step, over all ranks."""
    comm_share: float | None = None
    """`comm_s` over the step's time."""
    loss: float | None = None
    """Of the last logged step."""
    eval_loss: float | None = None
    """Of the last evaluation on held-out text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that is shown."""

    rows: tuple[Row, ...]
    refused: tuple[Refused, ...] = ()
    differs: tuple[str, ...] = ()
    """Dotted keys, besides the strategy, its degrees, nodes and processes."""
    left_out: tuple[str, ...] = ()
    """Runs that could not be read, and why."""
    sweep: Path | None = None
    """The record of the sweep, if it is one and nothing else."""


SORTS: dict[str, tuple[Callable[[Row], Any], bool]] = {
    "tokens_per_s": (lambda row: row.tokens_per_s, True),
    "efficiency": (lambda row: row.efficiency, True),
    "step_s": (lambda row: row.step_s, False),
    "memory": (lambda row: row.peak_memory_bytes, False),
    "comm": (lambda row: row.comm_share, False),
    "loss": (lambda row: row.loss, False),
    "eval_loss": (lambda row: row.eval_loss, False),
    "strategy": (lambda row: (row.strategy, row.processes, row.nodes), False),
    "processes": (lambda row: (row.processes, row.nodes, row.strategy), False),
    "state": (lambda row: (row.state, row.strategy, row.processes), False),
    "run": (lambda row: row.run_id, False),
}
"""What `--sort` takes: the value, and whether the largest comes first. Without a value a run comes last."""


def collect(
    queries: Sequence[str], folder: Path, sort: str = "tokens_per_s", slurm: Slurm | None = None
) -> Comparison:
    """The runs that `queries` name, as they stand now.

    Args:
        queries: runs and sweeps, as `hpcdl.runs.query.find` takes them.
        folder: the folder of all runs.
        sort: a key of `SORTS`.
        slurm: whom to ask about active runs.

    Raises:
        UsageError: nothing has one of these names.
    """
    reading = read(query.find_all(queries, folder))
    views = reconcile(reading.views, slurm)
    specs = [_identity(view.run) for view in views]
    flat = [dict(_flat(spec)) for spec in specs]
    differs = differing(flat)
    rows = [
        _row(view, spec, {key: keys.get(key) for key in differs})
        for view, spec, keys in zip(views, specs, flat, strict=True)
    ]
    sweeps = [record for name in queries if (record := query.read_sweep(name, folder))]
    whole = len(sweeps) == 1 and len(queries) == 1
    return Comparison(
        rows=ordered(scaled(rows), sort),
        refused=tuple(_refused(point) for record in sweeps for point in record["refused"]),
        differs=differs,
        left_out=tuple(reading.faults),
        sweep=folder / query.SWEEPS / f"{queries[0]}.json" if whole else None,
    )


def differing(flat: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The keys whose values differ, less those that follow from a key that differs anyway.

    Args:
        flat: each run's config by dotted keys.
    """
    every = dict.fromkeys(key for keys in flat for key in keys)
    found = [key for key in every if len({_text(keys.get(key, "")) for keys in flat}) > 1]
    degrees = {f"parallel.{name}" for name in DIMENSIONS}
    return tuple(
        key
        for key in found
        if key not in OWN_COLUMNS and key not in degrees and not _follows(key, found, flat)
    )


def _follows(key: str, found: Sequence[str], flat: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the value is told by the file that was chosen for its section."""
    leader = next((name for name in LEADERS if name.split(".")[0] == key.split(".")[0]), None)
    if leader is None or leader == key or leader not in found:
        return False
    values: dict[str, set[str]] = {}
    for keys in flat:
        values.setdefault(_text(keys.get(leader)), set()).add(_text(keys.get(key)))
    return all(len(same) == 1 for same in values.values())


def scaled(rows: Iterable[Row]) -> list[Row]:
    """The rows with their scaling efficiency: each against the smallest world of its kind."""
    rows = list(rows)
    smallest: dict[str, Row] = {}
    for row in rows:
        if row.tokens_per_s and (
            row.scales_with not in smallest or _smaller(row) < _smaller(smallest[row.scales_with])
        ):
            smallest[row.scales_with] = row
    return [_against(row, smallest.get(row.scales_with)) for row in rows]


def _smaller(row: Row) -> tuple[Any, ...]:
    """Orders what a run is compared with: fewest processes, fewest nodes, over, quickest."""
    return (row.processes, row.nodes, row.state != "COMPLETED", -(row.tokens_per_s or 0.0))


def _against(row: Row, base: Row | None) -> Row:
    if base is None or not base.tokens_per_s or row.tokens_per_s is None:
        return row
    each, other = row.tokens_per_s / row.processes, base.tokens_per_s / base.processes
    return dataclasses.replace(row, efficiency=each / other, baseline=base.run_id)


def ordered(rows: Iterable[Row], sort: str) -> tuple[Row, ...]:
    """The rows by a key of `SORTS`; those without a value last, in the order they had."""
    value, largest_first = SORTS[sort]
    rows = list(rows)
    having = [row for row in rows if value(row) is not None]
    return (
        *sorted(having, key=value, reverse=largest_first),
        *(row for row in rows if value(row) is None),
    )


def _row(view: View, spec: Mapping[str, Any], config: Mapping[str, Any]) -> Row:
    state, run = view.state, view.run
    lines = run.metrics()
    steps = [line for line in lines if "loss" in line]
    result = _result(run)
    tokens_per_s, step_s = speed(steps)
    parallel, cluster = spec.get("parallel", {}), spec.get("cluster", {})
    losses = [line for line in lines if line.get("eval_loss") is not None]
    return Row(
        run_id=state.run_id,
        name=state.name,
        run_dir=str(run.path),
        state=state.state,
        reason=state.reason,
        strategy=str(parallel.get("name", "?")),
        degrees=filled(parallel, state.world_size),
        nodes=state.nodes,
        processes_per_node=int(cluster.get("processes_per_node", state.world_size // max(1, state.nodes))),
        processes=state.world_size,
        cpus_per_process=int(cluster.get("cpus_per_process") or 1),
        gpus_per_node=int(cluster.get("gpus_per_node") or 0),
        started=state.started,
        ended=state.ended,
        config=config,
        scales_with=_without_cluster(spec),
        step=int(steps[-1]["step"]) if steps else 0,
        max_steps=state.max_steps,
        tokens_per_s=tokens_per_s,
        step_s=step_s,
        peak_memory_bytes=_peak(run, steps, result),
        node_memory_bytes=_node_peak(run),
        comm_s=_measured("comm_s", lines, result),
        comm_bytes=_measured("comm_bytes", lines, result),
        comm_share=_measured("comm_share", lines, result),
        loss=_number(steps[-1].get("loss")) if steps else None,
        eval_loss=_number(losses[-1].get("eval_loss")) if losses else None,
    )


def speed(steps: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Tokens/s and seconds a step: means over the logged steps.

    A mean and no median: strategies that meet every few steps pay for all of them in one. The first line is
    left out where there are others: it holds what is made ready once; so are profiled steps.

    Args:
        steps: lines of metrics.jsonl, each the average since the line before it.
    """
    tokens, seconds, count, last = 0.0, 0.0, 0, 0
    others = any(not line.get("profiled") for line in steps[1:])
    for number, line in enumerate(steps):
        took, rate, step = _number(line.get("step_s")), _number(line.get("tokens_per_s")), int(line["step"])
        passed, last = max(1, step - last), step
        skipped = (number == 0 and len(steps) > 1) or (line.get("profiled") and others)
        if took is None or rate is None or skipped:
            continue
        tokens, seconds, count = tokens + rate * took * passed, seconds + took * passed, count + passed
    return (tokens / seconds, seconds / count) if seconds else (None, None)


def filled(parallel: Mapping[str, Any], world_size: int) -> dict[str, int]:
    """The degrees above 1, the one that is -1 filled with what the others leave."""
    given = {name: parallel[name] for name in DIMENSIONS if isinstance(parallel.get(name), int)}
    dims = ParallelDims.possible(ParallelSpec(name="", **{"dp_replicate": 1, **given}), world_size)
    if dims is None:  # a spec that somebody has edited
        return {}
    return {name: degree for name, degree in dataclasses.asdict(dims).items() if degree > 1}


def _peak(run: RunDir, steps: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> int | None:
    """The most that any rank has held; where memory ran out, what it had come to."""
    cause = failure.root_cause(run)
    known = [_number(line.get("peak_memory_bytes")) for line in (*steps, result)]
    known.append(cause.peak_memory_bytes if cause else None)
    return int(max(value for value in known if value is not None)) if any(known) else None


def _node_peak(run: RunDir) -> int | None:
    """The most that the run's processes have held on any node."""
    most = 0
    for file in run.path.glob("system-*.jsonl"):
        last = last_line(file, having="peak_rss_bytes", window=1 << 18)
        # Old runs' lines don't say what the highest was.
        lines = read_lines(file) if last is None else [last]
        known = (_number(line.get(key)) for line in lines for key in ("peak_rss_bytes", "rss_bytes"))
        most = max(most, *(int(value or 0) for value in known), 0)
    return most or None


def _measured(key: str, lines: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> float | None:
    """A cost of communication: the result's, else the mean over the steps that were measured so far."""
    if (value := _number(result.get(key))) is not None:
        return value
    said = [value for line in lines if (value := _number(line.get(key))) is not None]
    return sum(said) / len(said) if said else None


def _identity(run: RunDir) -> dict[str, Any]:
    """The run's spec less what changes no result; empty where it can't be read."""
    try:
        plain = load_yaml(run.spec_file)
    except (OSError, yaml.YAMLError):
        return {}
    return identifying(plain) if isinstance(plain, dict) else {}


def _without_cluster(spec: Mapping[str, Any]) -> str:
    """Names the runs that differ in their cluster and degrees only."""
    parallel = {key: value for key, value in spec.get("parallel", {}).items() if key not in DIMENSIONS}
    return json.dumps({**spec, "cluster": None, "parallel": parallel}, sort_keys=True, default=str)


def _flat(plain: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in plain.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _refused(point: Mapping[str, Any]) -> Refused:
    return Refused(
        overrides=str(point.get("overrides", "")),
        reason=str(point.get("reason", "")),
        faults=tuple(point.get("faults", ())),
    )


def _result(run: RunDir) -> dict[str, Any]:
    try:
        record = json.loads(run.result_file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return record if isinstance(record, dict) else {}


def _number(value: object) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None  # type: ignore[return-value]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
