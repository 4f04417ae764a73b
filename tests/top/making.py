"""Runs as they are while they go on: samples of nodes, events, logs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hpcdl.monitor.records import GpuSample, NodeSample, ProcessSample, as_line
from hpcdl.runs.files import append_line
from hpcdl.runs.store import RunDir
from tests.runs.making import FakeJob, FakeSlurm, ago, make_run, make_submission

GIB = 1 << 30


def running(runs_dir: Path, run_id: str = "aaaa11112222", **fields: Any) -> RunDir:
    """A run of Slurm's that trains, without anything measured yet."""
    values = {"state": "RUNNING", "job_id": "7_0", "started": ago(120), "running_try": "0.0", **fields}
    return make_run(runs_dir, run_id, **values)


def ended(
    runs_dir: Path, run_id: str, state: str = "COMPLETED", seconds: float = 60.0, **fields: Any
) -> RunDir:
    """A run that ended so many seconds ago."""
    times = {"started": ago(seconds + 100), "ended": ago(seconds)}
    return make_run(runs_dir, run_id, state=state, job_id="6_0", **{**times, **fields})


def train(run: RunDir, steps: range, **more: Any) -> None:
    """Lines of metrics, written at once; the loss falls."""
    lines = [
        {
            "step": s,
            "loss": 1.5 + 3 * math.exp(-s / 40),
            "tokens_per_s": 12345.6,
            "step_s": 0.5,
            "time": ago(1),
            **more,
        }
        for s in steps
    ]
    with run.metrics_file.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def sample(run: RunDir, node: str = "n1", ranks: range = range(2), *, gpus: int = 0, **fields: Any) -> None:
    """One sample of a node: its ranks, a loader of the first, its GPUs."""
    processes = [
        ProcessSample(
            pid=1000 + rank,
            role="rank",
            rank=rank,
            step=40,
            phase="step",
            rss_bytes=3 * GIB,
            pss_bytes=2 * GIB,
            cpu_percent=97.5,
            threads=12,
            gpu_memory_bytes=61 * GIB if gpus else None,
        )
        for rank in ranks
    ]
    processes.append(ProcessSample(pid=900, role="loader", rank=ranks[0], rss_bytes=GIB // 2))
    values: dict[str, Any] = {
        "time": ago(2),
        "node": node,
        "attempt": "0.0",
        "cpu_percent": 195.0,
        "node_cpu_percent": 61.0,
        "rss_bytes": 6 * GIB,
        "pss_bytes": 5 * GIB,
        "memory_available_bytes": 48 * GIB,
        "memory_limit_bytes": 64 * GIB,
        "net_sent_bytes": 10_000_000,
        "net_received_bytes": 20_000_000,
        "processes": tuple(processes),
        "gpus": tuple(
            GpuSample(
                index=i,
                name="NVIDIA H100 80GB HBM3",
                memory_used_bytes=61 * GIB,
                memory_total_bytes=80 * GIB,
                percent=87.0 + i,
                power_w=412.0,
                temperature_c=65.0,
                throttled=("sw_power_cap",) if i == 1 else (),
            )
            for i in range(gpus)
        ),
        **fields,
    }
    append_line(run.path / f"system-{node}.jsonl", as_line(NodeSample(**values)))


def log(run: RunDir, *lines: str, node: str = "n1", attempt: str = "0.0") -> None:
    """Appends to a node's log; each line gets a time."""
    with (run.logs / f"{node}-try{attempt}.log").open("a") as file:
        file.write("".join(f"{ago(0)} {line}\n" for line in lines))


def array(fake: FakeSlurm, runs_dir: Path, count: int, job: int = 7) -> list[RunDir]:
    """The runs of one array that all train."""
    make_submission(runs_dir, job_id=str(job))
    fake.jobs[str(job)] = [FakeJob("RUNNING", tasks=str(i), start=ago(120), nodes="n1") for i in range(count)]
    return [
        running(runs_dir, f"{i:012x}", array_index=i, job_id=f"{job}_{i}", node_list=("n1",))
        for i in range(count)
    ]
