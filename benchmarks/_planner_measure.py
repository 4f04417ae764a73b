"""Runs points through hpcdl's own worker and keeps what every rank measured."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from _planner_points import Point

from hpcdl.runs import memory as report
from tests.worker.conftest import Workers

Measured = list[dict[str, Any]]
"""Of each rank: `tensors` and its categories as hpcdl.worker.storages counts them in a step, `at_peak`, `rss_peak`
(the process's whole life), `step_peak` (up to the measured step), `cuda_peak` where it ran on a GPU."""


def measure(
    points: Sequence[Point],
    folder: Path,
    at_once: int,
    done: Callable[[Point, Measured | str], None],
    *,
    results: bool = True,
) -> None:
    """Measures all points.

    Args:
        points: each in processes of its own, forked from one that has torch.
        folder: for run directories, which are taken away.
        at_once: how many points run side by side.
        done: gets the ranks' measurements of a point, or what it said as it failed.
        results: whether runs leave a result (weights, card, plot): the process's memory is then of its whole life.
    """
    free: SimpleQueue[Workers] = SimpleQueue()
    made = [Workers(folder / f"workers{i}", folder / "cache") for i in range(at_once)]
    for workers in made:
        free.put(workers)

    def one(point: Point) -> None:
        workers = free.get()
        try:
            done(point, measured(point, workers, results=results))
        finally:
            free.put(workers)

    try:
        with ThreadPoolExecutor(at_once) as pool:
            for future in [pool.submit(one, point) for point in points]:
                future.result()
    finally:
        for workers in made:
            workers.close()


def measured(point: Point, workers: Workers, *, results: bool = True) -> Measured | str:
    """What each rank measured; where it failed, the end of its log."""
    run = workers.make(**point.settings)
    env = {} if results else {"PLANNER_NO_RESULT": "1"}
    try:
        finished = workers.go(run, point.ranks, ok=False, module="benchmarks._planner_child", env=env)
        if finished.codes != [0] * point.ranks:
            return finished.log[-3000:]
        return [_of_rank(run.path, rank) for rank in range(point.ranks)]
    finally:
        shutil.rmtree(run.path, ignore_errors=True)


def _of_rank(run: Path, rank: int) -> dict[str, Any]:
    record = json.loads(report.file_of(run, rank).read_text())
    process = json.loads((run / f"process-rank{rank}.json").read_text())
    measured = record["measured"]
    on_gpu = record["device"] == "cuda"
    return {
        **measured,
        **process,
        "device": record["device"],
        "at_peak": record["at_peak"],
        "step_peak": measured["peak"],
        "cuda_peak": measured["peak"] if on_gpu else None,
    }


if __name__ == "__main__":
    sys.exit("run benchmarks/planner.py")
