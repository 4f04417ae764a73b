"""Runs with metrics and samples of two nodes, without training one."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hpcdl.monitor.records import GpuSample, NodeSample, ProcessSample, as_line
from hpcdl.runs.files import append_line
from hpcdl.runs.store import RunDir
from hpcdl.spec.plain import dump_yaml, to_plain
from tests.factory import tiny_spec
from tests.runs.making import make_run

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
NODES = ("n1", "n2")


def at(second: float) -> str:
    return (BEGIN + timedelta(seconds=second)).isoformat(timespec="milliseconds")


def tracked(runs_dir: Path, run_id: str = "aaaa11112222", tracker: str = "wandb", **fields: Any) -> RunDir:
    """A run as a launch leaves it, without a step."""
    run = make_run(runs_dir, run_id, **{"kind": "local", "state": "COMPLETED", **fields})
    spec = tiny_spec(tracker__name=tracker, tracker__tags=["x"])
    run.spec_file.write_text(dump_yaml(to_plain(spec)))
    return run


def train(run: RunDir, steps: range, *, loss: float = 4.0, attempt: str = "0.0", late_s: float = 0.0) -> None:
    """Lines of `steps`, one a second, and two samples of each node meanwhile."""
    for step in steps:
        now = step + late_s
        for number, node in enumerate(NODES):
            for part in (0.4, 0.8):
                rank = ProcessSample(
                    pid=7, role="rank", rank=number, rss_bytes=1000 * step, cpu_percent=100 * part
                )
                gpu = GpuSample(index=0, memory_used_bytes=step, percent=50.0)
                sample = NodeSample(
                    time=at(now - 1 + part), node=node, attempt=attempt, rss_bytes=2000 * step + int(10 * part),
                    cpu_percent=100 * part, processes=(rank,), gpus=(gpu,),
                )  # fmt: skip
                append_line(run.path / f"system-{node}.jsonl", as_line(sample))
        line = {"step": step, "loss": loss - step / 100, "mfu": None, "time": at(now)}
        append_line(run.metrics_file, line)


def rewind(run: RunDir, step: int) -> None:
    """What a new try does with what a lost one wrote after its checkpoint."""
    from hpcdl.worker.metrics import Metrics

    Metrics(run, active=True).rewind(step)


def ends(run: RunDir, state: str) -> None:
    run.write_state(dataclasses.replace(run.read_state(), state=state), durable=False)  # type: ignore[arg-type]
