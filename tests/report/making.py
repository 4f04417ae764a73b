"""Run directories with everything in them that a report shows."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hpcdl.monitor import records
from hpcdl.monitor.records import GpuSample, NodeSample, ProcessSample
from hpcdl.monitor.stragglers import COLUMNS
from hpcdl.runs.files import append_line, write_json
from hpcdl.runs.query import SWEEPS
from hpcdl.runs.store import RunDir
from hpcdl.spec.plain import dump_yaml, to_plain
from tests.factory import tiny_spec
from tests.runs.making import make_run

START = datetime(2026, 11, 1, 12, 0, 0, tzinfo=UTC)
MIB = 1 << 20
NODES = ("c1", "c2")


def at(seconds: float) -> str:
    """A moment of the run."""
    return (START + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def told(run: RunDir, *events: tuple[float, str, dict[str, Any]]) -> None:
    """Events at their seconds."""
    for seconds, kind, details in events:
        append_line(run.events_file, {"time": at(seconds), "event": kind, **details})


FAULT = {
    "kind": "killed",
    "step": 14,
    "saved": 10,
    "reason": "SIGKILL: killed (rank 3, node c2)",
    "why": "requeue 1 of 3",
    "node": "c2",
    "then": "requeue",
}
STRAGGLER = {
    "rank": 1,
    "node": "c1",
    "slower_by": 1.8,
    "cause": "delay",
    "since_step": 12,
    "why": "waits for a processor",
}
STORY: tuple[tuple[float, str, dict[str, Any]], ...] = (
    (0, "submitted", {"attempt": 0, "submission": "tok1"}),
    (60, "started", {"try": "0.0", "nodes": 2, "node_list": ["c1", "c2"], "job_id": "7"}),
    (80, "loaded", {"seconds": 1.0}),
    (100, "checkpoint", {"step": 10, "seconds": 1.0}),
    (108, "requeued", {**FAULT, "requeues": 1}),
    (168, "started", {"try": "0.1", "nodes": 2, "node_list": ["c1", "c3"], "job_id": "7"}),
    (178, "loaded", {"seconds": 1.0}),
    (178, "resumed", {"step": 10}),
    (190, "straggler", STRAGGLER),
    (198, "checkpoint", {"step": 20, "seconds": 1.0}),
    (200, "finished", {"step": 20}),
)
"""A run on two nodes of which one is lost: 10 steps again."""


def full_run(
    runs_dir: Path, run_id: str = "aaaa11112222", word: str = "", steps: int = 20, **dotted: Any
) -> RunDir:
    """A run that has been through STORY.

    Args:
        runs_dir: the folder of all runs.
        run_id: its id.
        word: stands wherever others can write something.
        steps: logged ones.
        **dotted: keys of its spec.
    """
    keys = {"cluster__nodes": 2, "cluster__processes_per_node": 2, "cluster__cpus_per_process": 4, **dotted}
    spec = tiny_spec(**{**keys, "cluster__gpus_per_node": 2})
    run = make_run(
        runs_dir, run_id, state="COMPLETED", kind="local", submission=None, nodes=2, world_size=4, max_steps=steps,
        created=at(0), started=at(60), ended=at(200), node_list=("c1", "c3"), reason=word, requeues=1,
    )  # fmt: skip
    plain = to_plain(spec)
    plain["task"]["sample_prompt"] = word
    run.spec_file.write_text(dump_yaml(plain))
    run.job_file.write_text(f"#!/bin/bash\n#SBATCH --nodes=2\n# {word}\nsrun true\n")
    told(run, *STORY)
    if word:
        told(run, (150, "warning", {"message": word}), (199, "leak", {"message": word, "node": word}))
    for step in range(1, steps + 1):
        append_line(run.metrics_file, line(step))
    append_line(run.metrics_file, {"step": steps, "eval_loss": 3.0, "time": at(199)})
    for node in ("c1", "c3"):
        samples(run, node)
    write_memory(run)
    write_ranks(run)
    sample = {"prompt": word or "The", "before": f"The{word}xx", "after": f"The{word} statement"}
    write_json(run.result_file, {"eval_loss_before": 5.0, "eval_loss_after": 3.0, "sample": sample})
    return run


def line(step: int) -> dict[str, Any]:
    """A logged step."""
    return {
        "step": step, "loss": 5.0 - step / 10, "tokens_per_s": 1000.0 + step, "step_s": 0.5, "mfu": 0.3, "lr": 0.01,
        "grad_norm": 1.0 / step, "peak_memory_bytes": 300 * MIB, "time": at(80 + 5 * step),
    }  # fmt: skip


def samples(run: RunDir, node: str) -> None:
    """What the monitor writes."""
    for number in range(10):
        ranks = [
            ProcessSample(
                pid=100 + r,
                role="rank",
                rank=r,
                rss_bytes=(200 + number) * MIB,
                cpu_percent=90.0,
                step=2 * number,
            )
            for r in ((0, 1) if node == "c1" else (2, 3))
        ]
        gpus = [
            GpuSample(
                index=g, name="H100", percent=80.0, memory_used_bytes=900 * MIB, memory_total_bytes=1000 * MIB
            )
            for g in (0, 1)
        ]
        sample = NodeSample(
            time=at(80 + 12 * number), node=node, attempt="0.1", cpu_percent=180.0, rss_bytes=450 * MIB,
            memory_limit_bytes=1000 * MIB, net_sent_bytes=number * MIB, net_received_bytes=number * MIB,
            processes=tuple(ranks), gpus=tuple(gpus),
        )  # fmt: skip
        append_line(run.path / f"system-{node}.jsonl", records.as_line(sample))


def write_ranks(run: RunDir) -> None:
    """Each rank's times in two windows; rank 1 is slow."""
    append_line(
        run.path / "ranks.jsonl", {"time": at(180), "nodes": ["c1", "c1", "c3", "c3"], "work": [1.0] * 4}
    )
    for step in (10, 20):
        times = {name: [0.01] * 4 for name in COLUMNS} | {"step_s": [0.5] * 4, "wait_s": [0.2, 0.0, 0.2, 0.2]}
        append_line(run.path / "ranks.jsonl", {"time": at(180 + step), "step": step, **times})


def write_memory(run: RunDir) -> None:
    """memory.json of the first rank."""
    parts = {"weights": 10 * MIB, "activations": 40 * MIB, "runtime": 200 * MIB, "peak": 260 * MIB}
    measured = {**parts, "tensors": 55 * MIB, "activations": 44 * MIB, "peak": 300 * MIB}
    record = {"step": 2, "rank": 0, "world_size": 4, "device": "cpu", "planned": parts, "measured": measured}
    (run.path / "memory.json").write_text(json.dumps(record))


def sweep(runs_dir: Path, points: int, refused: int = 1, word: str = "") -> str:
    """Runs of a sweep over seed, learning rate and processes; its id."""
    made = []
    for number in range(points):
        seed, lr, processes = number % 2, (0.001, 0.01, 0.1)[number % 3], (1, 2, 4)[number % 3]
        spec = tiny_spec(seed=seed, optim__lr=lr, cluster__processes_per_node=processes)
        failed = number == 4
        run = make_run(
            runs_dir, f"{number:06x}{'f' * 6}", state="FAILED" if failed else "COMPLETED", kind="local",
            submission=None, world_size=processes, max_steps=8, created=at(0), started=at(10), ended=at(100),
            reason=f"ValueError: loss is nan {word}" if failed else "",
        )  # fmt: skip
        run.spec_file.write_text(dump_yaml(to_plain(spec)))
        told(run, (0, "submitted", {}), (10, "started", {"try": "0.0", "nodes": 1, "node_list": ["c1"]}))
        told(run, (100, "failed" if failed else "finished", {"reason": "nan"}))
        for step in range(1, 9):
            value = {**line(step), "tokens_per_s": 900.0 * processes, "loss": 4.0 - step / 8 + lr + seed / 50}
            append_line(run.metrics_file, {**value, "peak_memory_bytes": (300 + 10 * processes) * MIB})
        made.append({"overrides": f"seed={seed}", "run_id": run.path.name, "run_dir": str(run.path)})
    left = [{"overrides": f"parallel=tp {word}", "reason": f"can't be {word}", "faults": []}] * refused
    folder = runs_dir / SWEEPS
    folder.mkdir(parents=True)
    record = {
        "sweep": "sweep-1a2b3c4d",
        "name": f"swept{word}",
        "created": at(0),
        "points": made,
        "refused": left,
    }
    (folder / "sweep-1a2b3c4d.json").write_text(json.dumps(record))
    return "sweep-1a2b3c4d"
