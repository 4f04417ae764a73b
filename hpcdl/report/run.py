"""Everything that a run's report says, as one tree of plain values: page, Markdown and JSON are made of it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from hpcdl import __version__
from hpcdl.monitor import stragglers
from hpcdl.report import clean, cost, nodes, series, timeline
from hpcdl.report.cost import Prices
from hpcdl.report.timeline import FAULTS, NOTES, Try
from hpcdl.runs import failure, memory
from hpcdl.runs.compare_row import row_of
from hpcdl.runs.reconcile import View
from hpcdl.runs.state import ACTIVE
from hpcdl.runs.store import RunDir, now
from hpcdl.spec.plain import load_yaml

CURVES = ("loss", "tokens_per_s", "step_s", "mfu", "grad_norm", "lr", "peak_memory_bytes", "comm_s")
"""Keys of metrics.jsonl that are drawn by step."""
_SECTIONS = ("parallel", "cluster")
MOST_EVENTS = 500
"""Warnings and faults that a report lists; and marks of one kind in a try."""
MOST_TEXT = 200_000
"""Characters of a file that a page shows."""


def collect(view: View, prices: Prices) -> dict[str, Any]:
    """The report of one run.

    Args:
        view: the run as it stands now.
        prices: an hour's.
    """
    run, state = view.run, view.state
    spec, events, lines = _spec(run), run.events(), run.metrics()
    active = state.state in ACTIVE
    made = now()
    tries = timeline.read(events, lines, state.ended or made, active=active)
    cluster = _section(spec, "cluster")
    per_node = int(cluster.get("processes_per_node") or max(1, state.world_size // max(1, state.nodes)))
    map_, curves = nodes.read(run, tries, events, per_node)
    steps = [line for line in lines if "loss" in line and type(line.get("step")) is int]
    report = {
        "report": "run",
        "version": 1,
        "hpcdl": __version__,
        "made": made,
        "run": {
            **dataclasses.asdict(state),
            "run_dir": str(run.path),
            "step": max([line["step"] for line in steps], default=0),
            "unchecked": view.unchecked,
            "again": _again(run),
            "code": spec.get("code"),
            "git": _git(run),
        },
        "result": _json(run.result_file),
        "before": _before(run),
        "speed": _speed(view, spec, steps),
        "curves": {
            **{key: series.thin(series.curve(steps, key)) for key in CURVES},
            **{key: series.thin(series.curve(lines, key)) for key in ("eval_loss", "eval_perplexity")},
        },
        "not_finite": [line.get("step") for line in steps if series.number(line.get("loss")) is None][:10],
        "memory": _memory(run, spec),
        "tries": [_try(each) for each in tries],
        "nodes": [dataclasses.asdict(node) for node in map_],
        "system": [dataclasses.asdict(curve) for curve in curves],
        "ranks": [
            {
                "rank": row.rank,
                "node": row.node,
                "wait_share": row.wait_share,
                **dataclasses.asdict(row.times),
            }
            for row in stragglers.of_run(run)
        ],
        "own_s": _own_times(run),
        "faults": _told(events, FAULTS),
        "warnings": _told(events, tuple(NOTES)),
        "cost": _cost(tries, cluster, prices),
        "error": _error(run, state.state),
        "spec": _flat(spec),
        "spec_text": clean.document(_text(run, "spec.yaml")),
        "job_text": clean.document(_text(run, "job.sh")),
    }
    plain: dict[str, Any] = clean.plain(report)
    return plain


def _again(run: RunDir) -> str:
    """What makes a new try of the same experiment, from what was resolved then."""
    return (
        f"hpcdl launch --config-dir {shlex.quote(str(run.path))} --config-name spec"
        f" runs_dir={shlex.quote(str(run.runs_dir))} force=true"
    )


def _speed(view: View, spec: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures, as `hpcdl compare` has them."""
    whole = {key: value for key, value in spec.items() if isinstance(value, Mapping) or key not in _SECTIONS}
    row = row_of(view, whole, {})
    mfu = [value for line in steps[1:] if (value := series.number(line.get("mfu"))) is not None]
    keys = ("strategy", "degrees", "processes_per_node", "processes", "tokens_per_s", "step_s", "peak_memory_bytes",
            "node_memory_bytes", "comm_s", "comm_bytes", "comm_share", "loss", "eval_loss")  # fmt: skip
    return {**{key: getattr(row, key) for key in keys}, "mfu": sum(mfu) / len(mfu) if mfu else None}


def _own_times(run: RunDir) -> list[dict[str, Any]]:
    """Each rank's seconds a step without its waiting for others, by step."""
    found: dict[int, list[tuple[float, float]]] = {}
    for step, rows in stragglers.history(run):
        for row in rows:
            found.setdefault(row.rank, []).append((step, row.times.own_s))
    return [{"rank": rank, "points": series.thin(points)} for rank, points in sorted(found.items())]


def _before(run: RunDir) -> dict[str, Any]:
    """What the result says of the model before and after; null what it doesn't say."""
    result = _json(run.result_file) or {}
    sample = _section(result, "sample")
    texts = {key: sample[key] for key in ("prompt", "before", "after") if isinstance(sample.get(key), str)}
    said = None
    if len(texts) == 3:
        said = {
            key: text if key == "prompt" else text.removeprefix(texts["prompt"])
            for key, text in texts.items()
        }
    return {"eval_loss": series.number(result.get("eval_loss_before")), "sample": said}


def _memory(run: RunDir, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Planned and measured by category, of the first rank; and every rank's peak."""
    record = memory.load(run.path)
    limit = _section(spec, "cluster").get("mem_gb")
    ranks = []
    for rank in range(4096):
        other = _json(memory.file_of(run.path, rank))
        if other is None:
            break
        ranks.append({"rank": rank, "peak_bytes": series.number(_section(other, "measured").get("peak"))})
    if record is None:
        return {"rows": [], "ranks": ranks, "limit_bytes": _bytes(limit), "title": "", "remarks": []}
    planned, measured = _section(record, "planned"), record["measured"]
    rows: list[dict[str, Any]] = [
        {
            "name": label,
            "planned_bytes": series.number(planned.get(key)),
            "measured_bytes": series.number(measured.get(key)),
        }
        for key, label in memory.LABELS.items()
    ]
    return {
        "title": " ".join(memory.notes(record)),
        "device": str(record.get("device", "")),
        "rows": [
            row for row in rows if max(row["planned_bytes"] or 0.0, row["measured_bytes"] or 0.0) >= 1024
        ],
        "planned_peak_bytes": series.number(planned.get("peak")),
        "measured_peak_bytes": series.number(measured.get("peak")),
        "ranks": ranks,
        "limit_bytes": _bytes(limit),
        "remarks": list(memory.remarks(record)),
    }


def _try(each: Try) -> dict[str, Any]:
    marks = {}
    for kind in ("checkpoint", "evaluation", "resumed", "fault", "warning"):
        found = [mark for mark in each.marks if mark.kind == kind]
        every = max(1, -(-len(found) // MOST_EVENTS))
        marks[kind] = [dataclasses.asdict(mark) for mark in found[::every]]
    plain = {**dataclasses.asdict(each), "marks": [mark for kind in marks.values() for mark in kind]}
    for kind in ("queued", "starting", "running", "lost"):
        plain[f"{kind}_s"] = each.seconds(kind)
    return plain


def _told(events: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> list[dict[str, Any]]:
    found = [
        {"time": event.get("time"), "kind": event.get("event"), "text": timeline.said(event)}
        for event in events
        if event.get("event") in kinds
    ]
    return found[-MOST_EVENTS:]


def _cost(tries: Sequence[Try], cluster: Mapping[str, Any], prices: Prices) -> dict[str, Any]:
    made = cost.of_tries(tries, cluster, prices)
    return {**dataclasses.asdict(made), "lost_share": made.lost_share, "prices": dataclasses.asdict(prices)}


def _error(run: RunDir, state: str) -> dict[str, Any] | None:
    """The first thing that went wrong, of a run that ended by it."""
    found = failure.root_cause(run) if state not in (*ACTIVE, "COMPLETED", "CANCELLED") else None
    if found is None:
        return None
    return {"text": found.text, "traceback": found.traceback[-20_000:], "time": found.time}


def _git(run: RunDir) -> dict[str, Any] | None:
    """What git had of the code, in short."""
    for file in sorted((run.path / "code").glob("*.json")):
        record = _json(file)
        if record and record.get("commit"):
            return {key: record.get(key) for key in ("commit", "branch", "changed")}
    return None


def _text(run: RunDir, name: str) -> str:
    try:
        text = (run.path / name).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}\n… ({len(text):,} characters)"


def _spec(run: RunDir) -> dict[str, Any]:
    try:
        plain = load_yaml(run.spec_file)
    except (OSError, yaml.YAMLError):
        return {}
    return plain if isinstance(plain, dict) else {}


def _flat(plain: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping) and value:
            found.update(_flat(value, f"{above}{key}."))
        else:
            found[f"{above}{key}"] = value
    return found


def _section(plain: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = plain.get(name)
    return section if isinstance(section, Mapping) else {}


def _json(path: Any) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _bytes(gib: object) -> float | None:
    value = series.number(gib)
    return None if value is None else value * 2**30
