#!/usr/bin/env python3
"""Is training with `offload=stream` ordinary training, and what does it save and cost?

SmolLM2-135M, every weight, fp32, on Python's reference text, with gradient accumulation and clipping: `hpcdl launch`
without and with `offload=stream`, the same seed and optimizer. Compared are the losses and gradient norms of all
steps, the held-out loss, and every weight of the result; beside them the memory of the process tree, watched from
outside, and seconds a step.

    python benchmarks/streaming.py                     AdamW and SGD: about 3 GB of memory, 6 of disk, minutes
    python benchmarks/streaming.py --optim sgd --steps 2
    python benchmarks/streaming.py --model llama3_1b model.path=/where/Llama-3.2-1B

Exits with 1 where a loss or a weight is off by more than 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _rss
from _results import leave
from _timing import machine, markdown

MIB = 2**20
OFF = 1e-5
"""What losses (relative) and weights (absolute) may differ by."""
HERE = Path(__file__).resolve().parent
RATES = {"adamw": 2e-5, "sgd": 1e-2}
"""As full fine-tuning takes. AdamW divides a gradient by its own size: where that is near nothing, rounding decides
its sign, and a weight may be off by twice the rate."""


def main() -> int:
    args = arguments()
    report: dict[str, Any] = {
        "machine": machine(),
        "model": args.model,
        "steps": args.steps,
        "optimizers": {},
    }
    with tempfile.TemporaryDirectory(prefix="hpcdl-bench-", dir=args.folder) as scratch:
        for optim in args.optim:
            cases = {way: launch(args, optim, way, Path(scratch)) for way in ("none", "stream")}
            report["optimizers"][optim] = {"cases": cases, **differences(cases)}
            show(optim, report["optimizers"][optim])
            for case in cases.values():
                for file in Path(case["run"]).rglob("*.safetensors"):
                    file.unlink()
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    goals = [
        (f"{optim}: losses and weights within {OFF:g}", found["loss"] <= OFF and found["weight"] <= OFF)
        for optim, found in report["optimizers"].items()
    ]
    leave(report, goals)
    return 0 if all(met for _, met in goals) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2_135m", help="a file of conf/model")
    parser.add_argument("--optim", nargs="+", default=["adamw", "sgd"], choices=list(RATES))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--folder", help="for runs (default: the system's temporary folder)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("overrides", nargs="*", help="further overrides of the config")
    return parser.parse_args()


def launch(args: argparse.Namespace, optim: str, way: str, scratch: Path) -> dict[str, Any]:
    """One run: its figures, and where it lies."""
    runs = scratch / f"{optim}-{way}"
    argv = [
        *(sys.executable, "-m", "hpcdl.launch", f"model={args.model}", "data=pydoc", "train=full"),
        *(f"offload={way}", f"optim={optim}", f"optim.lr={RATES[optim]}", f"data.seq_len={args.seq_len}"),
        *(f"trainer.max_steps={args.steps}", "trainer.global_batch_size=2", "trainer.micro_batch_size=1"),
        *("trainer.eval_samples=4", "task.sample_prompt=''", "monitor=none", "trainer.keep_last=1"),
        *(f"runs_dir={runs}", "wait=true", *args.overrides),
    ]
    peak = _rss.measure(argv, dict(os.environ), HERE.parent, scratch / "log")
    if peak.code:
        raise SystemExit(f"{' '.join(argv)}\nfailed:\n{peak.output[-3000:]}")
    (result,) = runs.glob("*/*/result.json")
    lines = [json.loads(line) for line in (result.parent / "metrics.jsonl").read_text().splitlines()]
    for file in (result.parent / "checkpoints").rglob("*.distcp"):
        file.unlink()  # of no use here, and large
    steps = [line for line in lines if "loss" in line]
    return {
        "run": str(result.parent),
        "rss_mib": round(peak.rss_bytes / MIB),
        "step_s": round(min(line["step_s"] for line in steps), 3),
        "losses": [line["loss"] for line in steps],
        "norms": [line["grad_norm"] for line in steps],
        "heldout": [line["eval_loss"] for line in lines if "eval_loss" in line],
    }


def differences(cases: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The largest: of losses and norms relative, of weights absolute."""
    plain, streamed = cases["none"], cases["stream"]

    def relative(key: str) -> float:
        return max(abs(a / b - 1) for a, b in zip(streamed[key], plain[key], strict=True))

    largest, moved = 0.0, 0.0
    for ours, theirs in weights(Path(streamed["run"]) / "model", Path(plain["run"]) / "model"):
        largest = max(largest, float((ours - theirs).abs().max()))
        moved += float((ours - theirs).double().square().sum())
    return {
        "loss": max(relative("losses"), relative("heldout")),
        "norm": relative("norms"),
        "weight": largest,
        "weight_rms": (moved / sum(ours.numel() for ours, _ in weights(*two_models(cases)))) ** 0.5,
    }


def two_models(cases: dict[str, dict[str, Any]]) -> tuple[Path, Path]:
    return Path(cases["stream"]["run"]) / "model", Path(cases["none"]["run"]) / "model"


def weights(ours: Path, theirs: Path) -> Iterator[tuple[Any, Any]]:
    """The same tensor of both, one after the other; both must have the same."""
    from hpcdl.distributed import shards

    mine, other = shards.pieces(ours), shards.pieces(theirs)
    assert mine.keys() == other.keys()
    for name, piece in mine.items():
        yield piece.read(), other[name].read()


def show(optim: str, found: dict[str, Any]) -> None:
    rows = [
        [name, case["rss_mib"], case["step_s"], f"{case['losses'][-1]:.6f}", f"{case['heldout'][-1]:.6f}"]
        for name, case in found["cases"].items()
    ]
    print(f"\n{optim}\n")
    print(
        markdown(
            ["offload", "peak RSS, MiB", "s a step", "last loss", "held-out"],
            [list(map(str, r)) for r in rows],
        )
    )
    print(
        f"\nlargest difference: losses {found['loss']:.1e} and norms {found['norm']:.1e} (relative),"
        f" weights {found['weight']:.1e} (root mean square {found['weight_rms']:.1e})"
    )


if __name__ == "__main__":
    sys.exit(main())
