"""What was planned for a run when it was submitted, beside what was measured."""

from __future__ import annotations

import statistics
from typing import Any

from hpcdl.runs import memory, words
from hpcdl.runs.state import RunState
from hpcdl.runs.store import RunDir

KEY = "planned"
"""Of the `submitted` event: `peak_bytes` of a process, `step_s`, `run_s`; each null where it isn't known."""


def of(run: RunDir) -> dict[str, float]:
    """The plan of the last launch: the figures of it that are known; empty where none was recorded."""
    found = (event.get(KEY) for event in reversed(run.events()) if event.get("event") == "submitted")
    last = next(found, None)
    if not isinstance(last, dict):
        return {}
    return {key: value for key, value in last.items() if isinstance(value, int | float) and 0 < value < 1e30}


def in_words(run: RunDir, state: RunState) -> str:
    """`peak 1.4 GiB (measured 1.5 GiB), step 9.43 s (measured 9.9 s), in all 4:36`; empty where nothing was planned."""
    planned = of(run)
    parts = []
    if size := planned.get("peak_bytes"):
        record = memory.in_result(run.path, state.world_size) or {}
        parts.append(f"peak {words.size(size)}{_measured(record.get('peak_bytes'), words.size)}")
    if step_s := planned.get("step_s"):
        steps = [line["step_s"] for line in run.metrics() if line.get("step_s") and "loss" in line][1:]
        parts.append(
            f"step {_seconds(step_s)}{_measured(statistics.median(steps) if steps else None, _seconds)}"
        )
    if run_s := planned.get("run_s"):
        parts.append(f"in all {words.duration(run_s)}")
    return ", ".join(parts)


def _measured(value: Any, shown: Any) -> str:
    return f" (measured {shown(value)})" if value else ""


def _seconds(value: float) -> str:
    return f"{words.number(value, 3)} s"
