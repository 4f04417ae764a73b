"""`hpcdl plan --calibrate`: the planner's constants, fitted to the finished runs of a folder and kept beside them.

`<runs_dir>/.calibration.json` is then what every plan for that folder goes by; without it, or where it can't be read,
the planner's own constants count. Runs are planned anew, with the formulas of today: only what was measured is read.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpcdl.plan import beside, devices, hardware, memory, time
from hpcdl.plan import calibrate as fit
from hpcdl.plan.calibrate import Calibration, Held, Timed
from hpcdl.plan.records import Hardware, of_rank
from hpcdl.runs import memory as report
from hpcdl.runs import query
from hpcdl.runs.files import write_json
from hpcdl.runs.spec import read_spec
from hpcdl.runs.store import RunDir, all_runs, now
from hpcdl.spec import ExperimentSpec

FILE = ".calibration.json"
MOST = 200
"""Runs that are read: the newest."""
LEAST_STEPS = 3
"""Measured steps of a run, the first left out, from which on its time says something."""


def calibrate(runs_dir: Path) -> Calibration:
    """Fits the constants to the finished runs and keeps them.

    Args:
        runs_dir: the folder of all runs.

    Raises:
        OSError: the file can't be written.
    """
    views = [view for view in query.by_age(all_runs(runs_dir)) if view.state.state == "COMPLETED"]
    held: list[Held] = []
    timed: list[Timed] = []
    for view in reversed(views[-MOST:]):
        try:
            spec = read_spec(view.run.spec_file)
            held += _held(view.run, spec, view.state.world_size)
            timed += _timed(view.run, spec, view.state.world_size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # written by another version of hpcdl, or not whole
    found = Calibration(memory=fit.fit_memory(held), rates=fit.fit_rates(timed), time=now())
    if found.memory or found.rates:
        write_json(runs_dir / FILE, dataclasses.asdict(found))
    return found


def load(runs_dir: Path) -> Calibration | None:
    """What was fitted last; None where nothing was."""
    try:
        return Calibration.from_plain(json.loads((runs_dir / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def applied(runs_dir: Path, found: Hardware) -> Hardware:
    """The hardware with what the runs of this folder have shown."""
    known = load(runs_dir)
    return found if known is None else known.of_hardware(found)


def _held(run: RunDir, spec: ExperimentSpec, world_size: int) -> Iterator[Held]:
    """What each rank of the run had, beside today's plan for it."""
    for record in report.of_ranks(run.path, world_size):
        kind, rank = record["device"], record["rank"]
        stages = memory.ranks(spec, kind, record["world_size"])
        peak = _peak(record)
        if kind == "cpu" and peak and spec.monitor.name != "none" and spec.monitor.communication_steps:
            peak += beside.PROFILER  # which the worker leaves out of what it has measured
        if stages is not None and peak:
            yield Held(run=run.path.name, kind=kind, plan=of_rank(stages, rank), peak=peak)


def _peak(record: dict[str, Any]) -> int | None:
    """The most that the device's memory had of this process; None: not measured."""
    measured, ended = record["measured"], record.get("ended") or {}
    if record["device"] == "cpu":
        return int(max(measured["peak"], ended.get("peak", 0)))
    if "beside" not in ended:
        return None
    reserved = max(measured["reserved"], ended["reserved"])
    return int(reserved + ended["beside"])


def _timed(run: RunDir, spec: ExperimentSpec, world_size: int) -> Iterator[Timed]:
    """The run's steps, where there are enough."""
    steps = [
        line["step_s"]
        for line in run.metrics()
        if line.get("step_s") and "loss" in line and not line.get("profiled")
    ][1:]
    if len(steps) < LEAST_STEPS:
        return
    here = hardware.of(spec, ask=False)

    def predict(factors: devices.Calibration) -> float | None:
        found = time.step(spec, devices.calibrated(here, factors, ""), world_size)
        return None if found is None else found.step_s

    yield Timed(device=here.device.name, step_s=statistics.median(steps), predict=predict)


# --- in words -------------------------------------------------------------------------------------------------


def in_words(found: Calibration, runs_dir: Path) -> list[str]:
    """What was fitted, line by line."""
    if not found.memory and not found.rates:
        return [f"no finished run in {runs_dir} has measured what a plan could be held against"]
    lines = []
    for kind, fitted in sorted(found.memory.items()):
        lines.append(
            f"memory on {_device(kind)}, {_runs(fitted.runs)}: {fitted.beside / 2**20:+.0f} MiB beside tensors,"
            f" allocator × {fitted.allocator:.2f}; median error of the peak {fitted.error_before:.1%} →"
            f" {fitted.error_after:.1%}; none of them is planned too small now"
        )
        if fitted.runs < fit.ENOUGH:
            lines.append(f"  fewer than {fit.ENOUGH} runs: nothing is planned smaller for them")
    for name, rates in sorted(found.rates.items()):
        factors = dataclasses.asdict(rates.factors)
        changed = ", ".join(f"{key} × {value:.2f}" for key, value in factors.items() if value != 1)
        lines.append(
            f"time on {name}, {_runs(rates.runs)}: {changed or 'nothing to change'};"
            f" median error of a step {rates.error_before:.0%} → {rates.error_after:.0%}"
        )
    return [
        *lines,
        f"kept in {runs_dir / FILE}: plans for this folder go by it; to forget it, delete the file",
    ]


def _device(kind: str) -> str:
    return "GPUs" if kind == "cuda" else "CPUs"


def _runs(count: int) -> str:
    return f"{count} finished run{'s' * (count != 1)}"
