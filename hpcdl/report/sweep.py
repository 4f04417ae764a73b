"""Everything that a sweep's report says, or that of several runs side by side, as one tree of plain values."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcdl import __version__
from hpcdl.report import clean, cost, series, timeline
from hpcdl.report.cost import Cost, Prices
from hpcdl.report.series import Point
from hpcdl.runs import compare, compare_groups, memory, query
from hpcdl.runs.compare_groups import Group
from hpcdl.runs.compare_row import Row
from hpcdl.runs.state import ACTIVE
from hpcdl.runs.store import RunDir, now

BEST = (
    ("eval_loss", "held-out loss", False),
    ("loss", "loss", False),
    ("tokens_per_s", "tokens/s", True),
    ("efficiency", "scaling efficiency", True),
    ("peak_memory_bytes", "memory", False),
    ("cost", "cost", False),
)
"""Of what the best point is named: key, words, and whether more is better."""
OVER_SEEDS = ("eval_loss", "loss", "tokens_per_s", "peak_memory_bytes")
"""Figures whose means over seeds are shown."""
CURVES_WHOLE = 60
"""Up to so many points have their curves read whole; of more, some places of each."""
PLACES = 40
"""Of a curve, where there are more of them."""
_FOR_GROUPING = ("scales_with", "apart_from_seed", "figures")
"""Of a row, what is long and says nothing that the other fields don't."""
KEPT_CURVES = 12
"""Curves of single runs in the report of a large sweep: those that end lowest."""


def collect(queries: Sequence[str], folder: Path, prices: Prices) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The report, and what had to be left out of it.

    Args:
        queries: a sweep's id, or several runs.
        folder: the folder of all runs.
        prices: an hour's.

    Raises:
        UsageError: nothing has one of these names.
    """
    comparison = compare.collect(queries, folder)
    record = query.read_sweep(queries[0], folder) if len(queries) == 1 else None
    costs = [_cost(row, prices) for row in comparison.rows]
    rows = [_row(row, each) for row, each in zip(comparison.rows, costs, strict=True)]
    total = cost.total(costs, prices)
    report = {
        "report": "sweep",
        "version": 1,
        "hpcdl": __version__,
        "made": now(),
        "title": (record or {}).get("name") or " ".join(queries),
        "sweep": (record or {}).get("sweep"),
        "created": (record or {}).get("created"),
        "runs_dir": str(folder),
        "states": dict(Counter(row.state for row in comparison.rows).most_common()),
        "differing": [
            key
            for key in ("parallel.name", "cluster.nodes", "cluster.processes_per_node")
            if _varies(key, rows)
        ]
        + list(comparison.differs),
        "rows": rows,
        "best": _best(rows),
        "seeds": _seeds(comparison.rows),
        "refused": [dataclasses.asdict(point) for point in comparison.refused],
        "left_out": list(comparison.left_out),
        "failed": [
            {
                "run_id": row.run_id,
                "state": row.state,
                "reason": row.reason,
                "step": row.step,
                "max_steps": row.max_steps,
            }
            for row in comparison.rows
            if row.state not in (*ACTIVE, "COMPLETED")
        ],
        "curves": _curves(comparison.rows),
        "cost": {
            **dataclasses.asdict(total),
            "lost_share": total.lost_share,
            "prices": dataclasses.asdict(prices),
        },
    }
    plain: dict[str, Any] = clean.plain(report)
    return plain, comparison.left_out


def _row(row: Row, spent: Cost) -> dict[str, Any]:
    plain = {
        field.name: getattr(row, field.name)
        for field in dataclasses.fields(row)
        if field.name not in _FOR_GROUPING
    }
    planned, measured = _memory(Path(row.run_dir))
    return {
        **plain,
        "config": {**_own(row), **row.config},
        "planned_peak_bytes": planned,
        "measured_peak_bytes": measured,
        "cpu_hours": spent.cpu_hours,
        "gpu_hours": spent.gpu_hours,
        "lost_share": spent.lost_share,
        "money": spent.money,
        "cost": spent.money if spent.money is not None else spent.gpu_hours or spent.cpu_hours,
    }


def _memory(folder: Path) -> tuple[float | None, float | None]:
    """Peak of the first rank, planned and measured."""
    record = memory.load(folder)
    if record is None:
        return None, None
    planned = record.get("planned")
    planned = planned.get("peak") if isinstance(planned, Mapping) else None
    return series.number(planned), series.number(record["measured"].get("peak"))


def _cost(row: Row, prices: Prices) -> Cost:
    run = RunDir(Path(row.run_dir))
    tries = timeline.read(run.events(), [], row.ended or now(), active=row.state in ACTIVE)
    asked = {
        "processes_per_node": row.processes_per_node,
        "cpus_per_process": row.cpus_per_process,
        "gpus_per_node": row.gpus_per_node,
    }
    return cost.of_tries(tries, asked, prices)


def _varies(key: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    return len({str(row["config"].get(key)) for row in rows}) > 1


def _best(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each metric in which the points differ, the run that is best."""
    found = {}
    done = [row for row in rows if row["state"] == "COMPLETED"] or rows
    for key, label, more in BEST:
        having = [row for row in done if row[key] is not None]
        if key == "efficiency":
            having = [row for row in having if row["baseline"] != row["run_id"]]
        if not having or (len({row[key] for row in having}) == 1 and len(having) > 1):
            continue
        best = (max if more else min)(having, key=lambda row: row[key])
        found[key] = {"label": label, "run_id": best["run_id"], "value": best[key]}
    return found


def _seeds(rows: Sequence[Row]) -> dict[str, Any]:
    """Points that differ in their seed only, as `hpcdl compare` judges them: means, spreads, and whether the others
    are worse than the best one.
    """
    judged = compare_groups.judge(rows, compare_groups.Asked())
    if not judged.seeds or not judged.metrics:
        return {"metric": None, "groups": []}
    metric = judged.metrics[0].name
    return {"metric": metric, "groups": [_group(group, metric) for group in judged.groups]}


def _group(group: Group, metric: str) -> dict[str, Any]:
    row, test = group.row, group.tests.get(metric)
    config = {key: value for key, value in row.config.items() if key != "seed"}
    return {
        "config": {**_own(row), **config},
        "runs": [each.run_id for each in group.rows],
        "completed": group.done,
        "best": metric in group.best_in,
        "p": None if test is None else test.adjusted,
        "figures": {
            key: {"mean": found.mean, "sd": found.sd, "n": found.n}
            for key in OVER_SEEDS
            if (found := group.stats.get(key)) is not None
        },
    }


def _own(row: Row) -> dict[str, Any]:
    return {
        "parallel.name": row.strategy,
        "cluster.nodes": row.nodes,
        "cluster.processes_per_node": row.processes_per_node,
    }


def _curves(rows: Sequence[Row]) -> dict[str, Any]:
    """The loss by step: of each run, or, where they are many, of the best ones and the stretch that all lie in."""
    if len(rows) <= CURVES_WHOLE:
        read = [(row, _loss(row, None)) for row in rows]
        thinned = [(row, series.thin(points, 200)) for row, points in read]
        return {"loss": [{"run_id": row.run_id, "points": points} for row, points in thinned], "shares": {}}
    read = [(row, _loss(row, PLACES)) for row in rows]
    shares = {"0.05": 0.05, "0.25": 0.25, "0.5": 0.5, "0.75": 0.75, "0.95": 0.95}
    lines = series.quantiles([points for _, points in read], list(shares.values()), most=PLACES)
    best = sorted((row for row, points in read if row.loss is not None), key=lambda row: row.loss or 0.0)
    return {
        "loss": [
            {"run_id": row.run_id, "points": series.thin(_loss(row, None), 200)} for row in best[:KEPT_CURVES]
        ],
        "shares": dict(zip(shares, lines, strict=True)),
    }


def _loss(row: Row, places: int | None) -> list[Point]:
    run = RunDir(Path(row.run_dir))
    lines = run.metrics() if places is None else series.sampled(run.metrics_file, places)
    return series.curve(lines, "loss")
