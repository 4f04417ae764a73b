#!/usr/bin/env python3
"""Is what parallel=auto chooses as quick as the best that can be chosen by hand?

    python benchmarks/auto.py                        here: two processes, a core each
    python benchmarks/auto.py --processes 4 --shapes narrow
    docker/cluster up && python benchmarks/auto.py --cluster        two nodes of the cluster in Docker

For each shape of model the planner chooses once; then its choice and every contender train the same model on the
same batches, one torchrun each, in turns (a round is one of each, beginning with another one each time). What counts
is the median optimizer step, the first ones left out. A contender is measured as it stands: the same micro-batch for
all but those that vary it, since `allow` lets auto vary it too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from _results import tell
from _timing import machine, markdown, paired_ratio

GOAL = 1.10
"""What was chosen may take this many times what the quickest measured one takes."""
ROOT = Path(__file__).resolve().parent.parent
CHECKOUT_IN_CLUSTER = "/hpcdl"
AUTO = "auto"
FIRST = 3
"""Steps that aren't counted: they fill caches and make buffers."""
BASE = (
    "+experiment=pretrain_tiny",
    "data=synthetic",
    "monitor=none",
    "preflight=none",
    "task.sample_prompt=''",
    "trainer.eval_samples=1",
    "trainer.checkpoint_every=0",
    "trainer.threads_per_process=1",
    "trainer.log_every=1",
    "force=true",
    "wait=true",
    "parsable=true",
)
SHAPES = {
    # of computing little, of calls many
    "narrow": (
        "model.shape.num_hidden_layers=4",
        "data.seq_len=128",
        "trainer.global_batch_size=16",
    ),
    # parameters many, tokens few: what travels is gradients
    "wide": (
        "model.shape.hidden_size=512",
        "model.shape.intermediate_size=1536",
        "model.shape.num_attention_heads=8",
        "model.shape.num_key_value_heads=4",
        "model.shape.num_hidden_layers=4",
        "model.shape.vocab_size=8192",
        "data.seq_len=64",
        "trainer.global_batch_size=8",
    ),
    # long sequences, a few of them: what counts is attention
    "long": (
        "model.shape.hidden_size=192",
        "model.shape.intermediate_size=512",
        "data.seq_len=1024",
        "trainer.global_batch_size=8",
    ),
}
"""Models and batches, as overrides."""
MICRO_BATCH = "trainer.micro_batch_size=2"
"""Of everyone but auto, which is free to choose, and those that vary it."""


@dataclass(kw_only=True)
class Contender:
    """One way to train, and how long its steps took."""

    name: str
    overrides: tuple[str, ...]
    steps_s: list[float] = field(default_factory=list)
    """The median step of each round."""
    failed: str = ""
    """Why it can't be, or what it said as it failed."""
    chosen: str = ""
    """What parallel=auto came to."""

    @property
    def step_s(self) -> float:
        return median(self.steps_s)


def main() -> int:
    args = arguments()
    if args.cluster and shutil.which("sbatch") is None:
        script = f"{CHECKOUT_IN_CLUSTER}/benchmarks/auto.py"
        return subprocess.run(
            [ROOT / "docker" / "cluster", "run", "python", script, *sys.argv[1:]], check=False
        ).returncode
    where = Path.home() if args.cluster else None  # the nodes must see it
    folder = Path(tempfile.mkdtemp(prefix="hpcdl-bench-", dir=where))
    try:
        results = [one_shape(args, shape, folder) for shape in args.shapes]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report = {"machine": machine(), "processes": args.processes, "cluster": args.cluster, "shapes": results}
    goals = [
        (f"{one['shape']}: at most {GOAL:.2f} × the best of {one['strategies']}; {one['ratio']}", one["met"])
        for one in results
    ]
    return tell(report, as_text(report), goals, as_json=args.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="over all nodes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of all contenders (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=15, help="of each run (default: %(default)s)")
    parser.add_argument(
        "--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES), help="default: all"
    )
    parser.add_argument("--cluster", action="store_true", help="two nodes of the cluster in Docker")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser.parse_args()


# --- what is compared -----------------------------------------------------------------------------------------


def contenders(processes: int) -> list[Contender]:
    """By hand: every dimension alone, and with four processes the usual pairs."""
    whole = {
        "ddp": ("parallel=ddp",),
        "ddp, micro-batch 1": ("parallel=ddp", "trainer.micro_batch_size=1"),
        "ddp, micro-batch 4": ("parallel=ddp", "trainer.micro_batch_size=4"),
        "ddp, recomputed": ("parallel=ddp", "trainer.activation_checkpointing=full"),
        "fsdp": ("parallel=fsdp",),
        "fsdp, kept gathered": ("parallel=fsdp", "parallel.reshard_after_forward=false"),
        "tp": ("parallel=tp", f"parallel.tp={min(2, processes)}"),
        "pp": ("parallel=pp", "trainer.micro_batch_size=1"),
        "cp": ("parallel=cp", f"parallel.cp={processes}"),
        "param_server": ("parallel=param_server",),
    }
    if processes >= 4:
        half = processes // 2
        whole |= {
            "hsdp": ("parallel=hsdp", f"parallel.dp_shard={half}"),
            "fsdp + tp": ("parallel=fsdp", "parallel.tp=2"),
            "pp + ddp": (
                "parallel=pp",
                "parallel.pp=2",
                f"parallel.dp_replicate={half}",
                "trainer.micro_batch_size=1",
            ),
        }
    return [Contender(name=name, overrides=overrides) for name, overrides in whole.items()]


def placed(args: argparse.Namespace) -> tuple[str, ...]:
    """Where they run."""
    if not args.cluster:
        return ("cluster=local", f"cluster.processes_per_node={args.processes}")
    return (
        "cluster=slurm_docker",
        "cluster.nodes=2",
        f"cluster.processes_per_node={args.processes // 2}",
        "cluster.cpus_per_process=1",
    )


def one_shape(args: argparse.Namespace, shape: str, folder: Path) -> dict[str, Any]:
    """All rounds of one shape, and whether the choice was good."""
    base = (*BASE, *placed(args), *SHAPES[shape], f"name={shape}", f"trainer.max_steps={args.steps}")
    everyone = [Contender(name=AUTO, overrides=("parallel=auto",)), *contenders(args.processes)]
    for contender in everyone[1:]:
        contender.overrides = (MICRO_BATCH, *contender.overrides)
    for turn in range(args.rounds):
        first = turn % len(everyone)
        for contender in (*everyone[first:], *everyone[:first]):
            if not contender.failed:
                measure(contender, base, folder / shape)
    return judged(shape, everyone, folder / shape)


def measure(contender: Contender, base: Sequence[str], runs_dir: Path) -> None:
    """One run; its median step is added."""
    command = [sys.executable, "-m", "hpcdl.launch", *base, *contender.overrides, f"runs_dir={runs_dir}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if done.returncode:
        contender.failed = next(
            (line for line in done.stderr.splitlines() if "problem" in line), done.stderr[-300:]
        )
        print(f"{contender.name}: {contender.failed.strip()}", file=sys.stderr, flush=True)
        return
    run = Path(done.stdout.splitlines()[0].split("\t")[2])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step_s"] for line in lines if line.get("step_s")][FIRST:]
    contender.steps_s.append(median(steps))
    if contender.name == AUTO:
        notes = (run / "spec.yaml").read_text().splitlines()
        contender.chosen = notes[0].removeprefix("# parallel=auto chose ")
    print(f"{contender.name}: {contender.steps_s[-1] * 1000:.1f} ms", file=sys.stderr, flush=True)


# --- what came out --------------------------------------------------------------------------------------------


def judged(shape: str, everyone: Sequence[Contender], folder: Path) -> dict[str, Any]:
    """The choice beside the quickest."""
    auto, *others = everyone
    if auto.failed:
        raise SystemExit(f"{shape}: parallel=auto failed: {auto.failed}")
    ran = [contender for contender in others if not contender.failed]
    best = min(ran, key=lambda contender: contender.step_s)
    ratio = paired_ratio(auto.steps_s, best.steps_s)
    return {
        "shape": shape,
        "chosen": auto.chosen,
        "step_s": {contender.name: contender.step_s for contender in (auto, *ran)},
        "failed": {contender.name: contender.failed.strip() for contender in others if contender.failed},
        "best": best.name,
        "ratio": str(ratio),
        "strategies": len(ran),
        "met": ratio.median <= GOAL and len(ran) >= 8,
    }


def as_text(report: dict[str, Any]) -> str:
    where = "two nodes of the cluster in Docker" if report["cluster"] else "this machine"
    parts = [
        f"{report['machine']}; {report['processes']} processes on {where}; the median step of each round"
    ]
    for result in report["shapes"]:
        rows = [
            [name, f"{1000 * step:.1f}", f"{step / result['step_s'][AUTO]:.2f}"]
            for name, step in sorted(result["step_s"].items(), key=lambda item: item[1])
        ]
        rows += [[name, "can't be", ""] for name in result["failed"]]
        verdict = "met" if result["met"] else "MISSED"
        parts.append(
            f"{result['shape']}: auto chose {result['chosen']}\n\n"
            + markdown(["strategy", "ms a step", "of auto's"], rows)
            + f"\n\nauto beside the quickest of {result['strategies']} ({result['best']}): {result['ratio']};"
            f" goal {GOAL:.2f}: {verdict}"
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
