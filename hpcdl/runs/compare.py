"""`hpcdl compare`: runs side by side. Here they are collected into rows (compare_row.py). compare_metrics.py knows
which of two figures is better, compare_groups.py puts runs together that differ in their seed only; compare_view.py,
compare_pair.py and compare_plot.py show them.

    collect   runs and sweeps → rows, the keys that differ, the points that were refused
    scaled    rows → the same with their scaling efficiency
    ordered   rows → the same, the best first
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hpcdl.experiment.identity import identifying
from hpcdl.runs import many, query
from hpcdl.runs.compare_row import Row, row_of, with_figures
from hpcdl.runs.reconcile import View, reconcile
from hpcdl.runs.scheduler import Slurm
from hpcdl.runs.store import RunDir
from hpcdl.spec.parallel import DIMENSIONS
from hpcdl.spec.plain import load_alike

__all__ = ["Comparison", "Refused", "Row", "collect", "ordered", "scaled"]

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
    named: tuple[str, ...] = ()
    """Run ids in the order in which they were asked for."""


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
    reading = query.read_all(queries, folder)
    views = reconcile(reading.views, slurm)
    sections: dict[str, dict[str, Any]] = {}
    specs = list(many.each(lambda view: _identity(view.run, sections), views))
    flat = [dict(_flat(spec)) for spec in specs]
    differs = differing(flat)

    def measured(found: tuple[View, Mapping[str, Any], Mapping[str, Any]]) -> Row:
        view, spec, keys = found
        return row_of(view, spec, {key: keys.get(key) for key in differs})

    rows = many.each(measured, zip(views, specs, flat, strict=True))
    sweeps = [record for name in queries if (record := query.read_sweep(name, folder))]
    whole = len(sweeps) == 1 and len(queries) == 1
    return Comparison(
        rows=ordered(scaled(rows), sort),
        refused=tuple(_refused(point) for record in sweeps for point in record["refused"]),
        differs=differs,
        left_out=tuple(reading.faults),
        sweep=folder / query.SWEEPS / f"{queries[0]}.json" if whole else None,
        named=tuple(view.state.run_id for view in views),
    )


def differing(flat: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The keys whose values differ, less those that follow from a key that differs anyway.

    Args:
        flat: each run's config by dotted keys.
    """
    every = dict.fromkeys(key for keys in flat for key in keys)
    found = [key for key in every if _differs([keys.get(key, "") for keys in flat])]
    degrees = {f"parallel.{name}" for name in DIMENSIONS}
    return tuple(
        key
        for key in found
        if key not in OWN_COLUMNS and key not in degrees and not _follows(key, found, flat)
    )


def _differs(values: Sequence[Any]) -> bool:
    """Whether they are not all the same; quick where the values of many runs are one object."""
    first = values[0]
    return any(value is not first and _text(value) != _text(first) for value in values)


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
    return with_figures(dataclasses.replace(row, efficiency=each / other, baseline=base.run_id))


def ordered(rows: Iterable[Row], sort: str) -> tuple[Row, ...]:
    """The rows by a key of `SORTS`; those without a value last, in the order they had."""
    value, largest_first = SORTS[sort]
    rows = list(rows)
    having = [row for row in rows if value(row) is not None]
    return (
        *sorted(having, key=value, reverse=largest_first),
        *(row for row in rows if value(row) is None),
    )


def _identity(run: RunDir, sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The run's spec less what changes no result; empty where it can't be read."""
    try:
        plain = load_alike(run.spec_file, sections)
    except (OSError, yaml.YAMLError):
        return {}
    return identifying(plain) if isinstance(plain, dict) else {}


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


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
