#!/usr/bin/env python3
"""How long does a checkpoint hold training up, written in the background and written at once?

A Llama of SmolLM2-135M's shape with AdamW's state (three numbers of 4 bytes a parameter) is trained on random
tokens by hpcdl's own engine and saved by its own Checkpointer, turn by turn in the same processes: once waiting
for the disk, once in the background. Waiting counts whatever keeps the loop from computing: the call that
begins a save, and the wait for the copy before the optimizer's step. Apart from that, a save in the
background takes cores and memory bandwidth from the steps beside it; that is shown in a column of its own.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --layers 4 --processes 2

One process (plain), and two (fsdp: each has half). Needs about 6 GB of memory and of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from _peers import free_port
from _results import tell
from _timing import machine, markdown, paired_ratio

GOAL = 0.1
"""A save in the background may hold training up for this share of a save that is waited for."""
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
}
"""SmolLM2-135M's; 30 layers."""


def main() -> int:
    args = arguments()
    if args.worker:
        Worker(args).measure(Path(args.worker))
        return 0
    with tempfile.TemporaryDirectory(prefix="hpcdl-bench-", dir=args.folder) as scratch:
        reports = [run(args, processes, Path(scratch)) for processes in args.processes]
    report = {"goal": GOAL, "machine": machine(), "cases": reports}
    goals = [
        (
            f"{case['processes']} process(es): in the background at most {GOAL} × waited for; {case['ratio_text']}",
            case["ratio"] <= GOAL,
        )
        for case in reports
    ]
    return tell(report, as_text(report), goals, as_json=args.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=30, help="blocks of the model (default: %(default)s)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs that count (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=32, help="tokens a step (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="a process (default: %(default)s)")
    parser.add_argument("--folder", help="where checkpoints go: the disk that is measured (default: $TMPDIR)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(args: argparse.Namespace, processes: int, scratch: Path) -> dict[str, Any]:
    """One world size: its processes, and what its first one has written."""
    folder = scratch / str(processes)
    folder.mkdir()
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": str(args.threads),
    }
    argv = [sys.executable, __file__, *sys.argv[1:], "--worker", str(folder)]
    started = [
        subprocess.Popen(argv, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit("a worker failed: its words are above")
    found: dict[str, Any] = json.loads((folder / "measured.json").read_text())
    ratio = paired_ratio(found["stalled_s"], found["waited_s"])
    slowed = [lost - stalled for lost, stalled in zip(found["lost_s"], found["stalled_s"], strict=True)]
    return {
        **found,
        "processes": processes,
        "ratio": ratio.median,
        "ratio_text": f"{ratio.median:.3f} ({ratio.low:.3f}–{ratio.high:.3f})",
        "slowed_s": [round(seconds, 3) for seconds in slowed],
    }


class Worker:
    """One process of the training that is measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from hpcdl.distributed.mesh import Grid
        from hpcdl.spec.checkpoint import Totals
        from hpcdl.spec.parallel import ParallelDims
        from hpcdl.worker import model, network, process

        self.args = args
        self.who = process.from_environment()
        torch.set_num_threads(args.threads)
        self.device = torch.device("cpu")
        process.join(self.who, self.device)
        spec = experiment(args, self.who.world_size)
        grid = Grid(ParallelDims.fill(spec.parallel, self.who.world_size), self.device)
        net = network.prepare(spec, model.load(spec, None), self.device)
        self.parameters = network.size_of(net.model).parameters
        self.engine = network.parallelize(spec, net, grid)
        self.spec = spec
        self.totals = Totals()

    def measure(self, folder: Path) -> None:
        """Turns of both ways; the first of each is not counted: it imports, and makes the buffers."""
        import torch

        from hpcdl.runs.store import RunDir
        from hpcdl.worker.checkpoint import Checkpointer
        from hpcdl.worker.keeping import Keeper
        from hpcdl.worker.process import leave

        run = RunDir(folder)
        keeper = Keeper(run, self.who, self.spec.trainer)
        agreed = [keeper.token]  # as a training's ranks do when they choose where to begin
        torch.distributed.broadcast_object_list(agreed, src=0)
        (keeper.token,) = agreed
        self.saver = Checkpointer(run, self.who, self.engine, self.spec, keeper, data_digest="none")
        turns = [self._turn() for _ in range(self.args.rounds + 1)][1:]
        if self.who.is_first:
            sizes = [event["bytes"] for event in run.events() if event["event"] == "checkpoint"]
            measured = {
                "parameters": self.parameters,
                "bytes": sizes[-1],
                "waited_s": [turn[0] for turn in turns],
                "stalled_s": [turn[1] for turn in turns],
                "background_s": [
                    event["seconds"]
                    for event in run.events()
                    if event["event"] == "checkpoint" and event["stalled_s"] != event["seconds"]
                ][1:],
                "lost_s": [turn[2] for turn in turns],
                "step_s": [turn[3] for turn in turns],
            }
            (folder / "measured.json").write_text(json.dumps(measured))
        leave()

    def _turn(self) -> tuple[float, float, float, float]:
        """Seconds: waited for a save; stalled by one in the background; lost to it in all; of a quiet step.

        The longest of any process.
        """
        quiet = median(self._step()[0] for _ in range(2))
        waited = self._save(wait=True)
        self._step()  # what the disk still does
        stalled = self._save(wait=False)
        lost, steps, whole = stalled, 0, False
        while not whole:
            took, waiting = self._step()
            lost, stalled, steps = lost + took, stalled + waiting, steps + 1
            whole = self._everywhere(self.saver.is_idle)
        return self._longest(waited), self._longest(stalled), lost - steps * quiet, quiet

    def _save(self, *, wait: bool) -> float:
        self.totals.step += 1
        started = time.perf_counter()
        self.saver.save(self.totals, wait=wait)
        return time.perf_counter() - started

    def _step(self) -> tuple[float, float]:
        """A step of the loop; its seconds, and those that it has waited for a copy."""
        started = time.perf_counter()
        batch = next(self._batches())
        self.engine.accumulate([batch], self.args.seq_len * self.who.world_size)
        settling = time.perf_counter()
        self.saver.settle()
        settled = time.perf_counter()
        self.engine.step(1e-4, 1.0)
        return time.perf_counter() - started, settled - settling

    def _batches(self) -> Iterator[dict[str, Any]]:
        import torch

        while True:
            tokens = torch.randint(0, SHAPE["vocab_size"], (1, self.args.seq_len + 1))
            places = torch.arange(self.args.seq_len)[None]
            yield {"input_ids": tokens[:, :-1], "position_ids": places, "labels": tokens[:, 1:]}

    def _longest(self, seconds: float) -> float:
        from hpcdl.worker.control import gather

        return float(gather([seconds], self.device).max())

    def _everywhere(self, true: bool) -> bool:
        from hpcdl.worker.control import gather

        return bool(gather([float(true)], self.device).min())


def experiment(args: argparse.Namespace, processes: int) -> Any:
    """The spec of what is trained."""
    from hpcdl.launch import sweep
    from hpcdl.launch.compose import Composer

    shape = {**SHAPE, "num_hidden_layers": args.layers}
    overrides = (
        *(
            "name=checkpoint",
            "model=llama_tiny",
            *(f"model.shape.{key}={value}" for key, value in shape.items()),
        ),
        *("data=synthetic", f"data.seq_len={args.seq_len}", "monitor=none", "trainer.max_steps=1000"),
        *(f"parallel={'ddp' if processes == 1 else 'fsdp'}", f"cluster.processes_per_node={processes}"),
        *(f"trainer.global_batch_size={processes}", "trainer.micro_batch_size=1"),
        *("trainer.checkpoint_every=1", "trainer.keep_last=1"),
    )
    return sweep.read(Composer(), overrides, multirun=False).points[0].spec


def as_text(report: dict[str, Any]) -> str:
    """The table, and what stands beside it."""
    head = (
        "processes",
        "state",
        "waited for",
        "in the background",
        "ratio",
        "writing took",
        "steps slowed by",
    )
    rows: Sequence[Sequence[str]] = [
        (
            str(case["processes"]),
            f"{case['bytes'] / 1e9:.2f} GB",
            f"{median(case['waited_s']):.2f} s",
            f"{median(case['stalled_s']):.3f} s",
            case["ratio_text"],
            f"{median(case['background_s']):.2f} s",
            f"{median(case['slowed_s']):.2f} s",
        )
        for case in report["cases"]
    ]
    millions = report["cases"][0]["parameters"] / 1e6
    good = all(case["ratio"] <= report["goal"] for case in report["cases"])
    return "\n".join(
        [
            f"{millions:.1f}M parameters with AdamW's state; how long training was held up by one checkpoint",
            "",
            markdown(head, rows),
            "",
            f"ratio: median (quartiles) of pairs; goal {report['goal']} at most: {'met' if good else 'MISSED'}.",
            f"a step without a save: {median(report['cases'][0]['step_s']):.2f} s; {report['machine']}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
