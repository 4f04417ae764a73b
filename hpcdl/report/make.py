"""What `hpcdl report` was asked for: one run's report, or that of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcdl.report import run, sweep
from hpcdl.report.cost import Prices
from hpcdl.runs import query
from hpcdl.runs.reconcile import look


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A report, not written yet."""

    report: dict[str, Any]
    name: str
    """The file's, without its ending, in a folder that isn't the run's own."""
    home: Path
    """The file that it is written to by default, without its ending."""
    left_out: tuple[str, ...] = ()
    """Runs that could not be read, and why."""


def report(queries: Sequence[str], folder: Path, prices: Prices) -> Made:
    """The report of what `queries` name.

    Args:
        queries: a run; or a sweep or several runs, which are shown side by side.
        folder: the folder of all runs.
        prices: an hour's.

    Raises:
        UsageError: nothing has one of these names.
    """
    record = query.read_sweep(queries[0], folder) if len(queries) == 1 else None
    runs = query.find_all(queries, folder) if record is None else []
    if len(runs) == 1:
        view = look(runs[0])
        made = run.collect(view, prices)
        return Made(report=made, name=f"report-{view.state.run_id}", home=view.run.path / "report")
    made, left_out = sweep.collect(queries, folder, prices)
    if record is not None:
        home = folder / query.SWEEPS / f"{queries[0]}-report"
        return Made(report=made, name=f"report-{queries[0]}", home=home, left_out=left_out)
    return Made(report=made, name="report", home=Path.cwd() / "report", left_out=left_out)
