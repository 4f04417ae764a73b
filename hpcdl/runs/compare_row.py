"""One run of a comparison: what it is and what it has measured."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpcdl.runs import failure
from hpcdl.runs.files import last_line, read_lines
from hpcdl.runs.reconcile import View
from hpcdl.runs.store import RunDir
from hpcdl.spec.parallel import DIMENSIONS, ParallelDims, ParallelSpec


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
    seed: int | None = None
    scales_with: str = ""
    """The same for runs that differ in their cluster and degrees only."""
    apart_from_seed: str = ""
    """The same for runs that differ in their seed only."""
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
    figures: Mapping[str, float] = field(default_factory=dict)
    """Every number that the run has left, by its name: the fields of this row, else result.json's, else the last of
    metrics.jsonl."""


MEASURED = (
    *("tokens_per_s", "step_s", "efficiency", "peak_memory_bytes", "node_memory_bytes"),
    *("comm_s", "comm_bytes", "comm_share", "loss", "eval_loss"),
)
"""Fields that are measurements."""


def row_of(view: View, spec: Mapping[str, Any], config: Mapping[str, Any]) -> Row:
    """Measures a run.

    Args:
        view: the run.
        spec: what identifies its experiment; empty where it can't be read.
        config: of this the keys that differ between the runs.
    """
    state, run = view.state, view.run
    lines = run.metrics()
    steps = [line for line in lines if "loss" in line and type(line.get("step")) is int]
    result = _result(run)
    tokens_per_s, step_s = speed(steps)
    parallel, cluster = spec.get("parallel", {}), spec.get("cluster", {})
    losses = [line for line in lines if line.get("eval_loss") is not None]
    row = Row(
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
        seed=seed if type(seed := spec.get("seed")) is int else None,
        scales_with=_without_cluster(spec),
        apart_from_seed=json.dumps({**spec, "seed": None}, sort_keys=True, default=str) if spec else "",
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
    return with_figures(dataclasses.replace(row, figures={**_last(lines), **_numbers(result)}))


def with_figures(row: Row) -> Row:
    """The row whose figures agree with its fields."""
    own = {name: value for name in MEASURED if (value := getattr(row, name)) is not None}
    return dataclasses.replace(row, figures={**row.figures, **own})


def _last(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last of each number in metrics.jsonl."""
    kinds: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for line in lines:
        keys = tuple(line)
        kinds.pop(keys, None)
        kinds[keys] = line  # the kind that was written last is the last one
    return {name: value for line in kinds.values() for name, value in _numbers(line).items()}


def _numbers(plain: Mapping[str, Any], above: str = "") -> dict[str, float]:
    """The numbers in a record, those of what lies in it under dotted names."""
    found: dict[str, float] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{above}{key}.")
        elif (number := _number(value)) is not None:
            found[f"{above}{key}"] = number
    return found


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
    known = [number for line in (*steps, result) if (number := _number(line.get("peak_memory_bytes")))]
    if cause and cause.peak_memory_bytes:
        known.append(cause.peak_memory_bytes)
    return int(max(known)) if known else None


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
    said = [value for line in lines if key in line and (value := _number(line[key])) is not None]
    return sum(said) / len(said) if said else None


def _without_cluster(spec: Mapping[str, Any]) -> str:
    """Names the runs that differ in their cluster and degrees only."""
    parallel = {key: value for key, value in spec.get("parallel", {}).items() if key not in DIMENSIONS}
    return json.dumps({**spec, "cluster": None, "parallel": parallel}, sort_keys=True, default=str)


def _result(run: RunDir) -> dict[str, Any]:
    try:
        record = json.loads(run.result_file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return record if isinstance(record, dict) else {}


def _number(value: object) -> float | None:
    if type(value) is float:
        return value if math.isfinite(value) else None
    return value if type(value) is int else None
