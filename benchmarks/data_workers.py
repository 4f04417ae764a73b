#!/usr/bin/env python3
"""How long does a training step wait for its micro-batches, built by the rank itself or ahead by workers?

Rows of random tokens, memory-mapped as a run's are; between two steps the rank computes for a while, so that
workers have time to be ahead. Steps with 0, 1 and 2 workers take turns. The goal is the default's: no number
of workers may beat `data.workers=0` by more than a hundredth of a step.

    python benchmarks/data_workers.py
    python benchmarks/data_workers.py --seq-len 8192 --micro-batch-size 1
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch
from _results import tell
from _timing import machine, markdown

from hpcdl.worker.data.loader import Loader, Reading
from hpcdl.worker.data.pack import START, TARGET
from hpcdl.worker.data.prepare import Rows

ROWS = 2000
MICRO_BATCHES = 4
GOAL = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="rows (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="that count (default: %(default)s)")
    parser.add_argument("--compute-s", type=float, default=0.1, help="of a step (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hpcdl-bench-") as folder:
        part = rows(Path(folder), args.seq_len)
        waits, started = measure(part, args)
    shape = f"{args.micro_batch_size} × {args.seq_len} tokens"
    title = f"{MICRO_BATCHES} micro-batches of {shape} a step of {args.compute_s} s"
    table = [
        [
            str(count),
            f"{1e3 * started[count]:.0f} ms",
            *(f"{1e3 * q:.2f} ms" for q in quantiles(waits[count])),
        ]
        for count in waits
    ]
    best = min(median(values) for values in waits.values())
    won = (median(waits[0]) - best) / args.compute_s
    goal = f"the best number beats none by at most {GOAL:.0%} of a step; {won:.2%}"
    made = markdown(("workers", "first step", "quartile", "median wait", "quartile"), table)
    report = {"machine": machine(), "shape": title, "waits_s": waits, "first_step_s": started, "won": won}
    text = f"{title}\n\n{made}\n\ngoal: {goal}; {report['machine']}"
    return tell(report, text, [(goal, won <= GOAL)], as_json=args.json)


def rows(folder: Path, seq_len: int) -> Rows:
    rng = np.random.default_rng(0)
    flags = np.full((ROWS, seq_len + 1), TARGET, np.uint8)
    flags[:, ::200] = START
    for name, array in (
        ("tokens", rng.integers(0, 250, flags.shape).astype(np.uint16)),
        ("flags", flags),
    ):
        np.save(folder / f"{name}.npy", array)
    mapped = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "flags")]
    return Rows(mapped[0], mapped[1], np.full((ROWS, 2), seq_len))


def measure(part: Rows, args: argparse.Namespace) -> tuple[dict[int, list[float]], dict[int, float]]:
    """Seconds that each step waits, by number of workers; and the first step, which starts them."""
    reading = Reading(
        seed=0,
        global_batch_size=MICRO_BATCHES * args.micro_batch_size,
        micro_batch_size=args.micro_batch_size,
        rank=0,
        ranks=1,
        last_step=args.steps + 1,
    )
    loaders = {n: Loader(part, reading, torch.device("cpu"), workers=n, prefetch=4) for n in (0, 1, 2)}
    waits: dict[int, list[float]] = {n: [] for n in loaders}
    for step in range(1, args.steps + 2):
        for count, loader in loaders.items():
            compute(args.compute_s)
            began = time.perf_counter()
            loader.micro_batches(step)
            waits[count].append(time.perf_counter() - began)
    for loader in loaders.values():
        loader.close()
    return {n: values[1:] for n, values in waits.items()}, {n: values[0] for n, values in waits.items()}


def compute(seconds: float) -> None:
    matrix = torch.randn(300, 300)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        matrix @ matrix


if __name__ == "__main__":
    sys.exit(main())
