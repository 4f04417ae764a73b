#!/usr/bin/env python3
"""Does a model of 8 billion parameters load, quantize, train and write in less than 8 GiB, on a CPU?

Makes a checkpoint of Llama-3.1-8B's shape (16 GB of random bf16 weights), runs `hpcdl launch` on it as a user
would (+experiment=qlora_8b_under_8gb: 4 bits, LoRA on all linear layers, seq 512) twice, without and with the
cache of quantized weights, then `hpcdl generate` from the adapter, and watches the memory of the whole process
tree from outside. Beside it the way that transformers, bitsandbytes and peft have, measured alike.

    python benchmarks/under_8gb.py                         all 32 layers: 16 GB of disk for shards, 6 for the cache
    python benchmarks/under_8gb.py --layers 2              what it does, in a few minutes
    python benchmarks/under_8gb.py --shape llama2_7b       keys and values for every head, 32,000 words
    python benchmarks/under_8gb.py --full                  one step of full-parameter training too

The peers' way needs about 20 GB at 32 layers; --peer-layers takes fewer (0: none).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import _rss
import _shards
from _results import tell
from _timing import machine, markdown

GIB = 2**30
PROMISE = 8.0
"""GiB that nothing may reach."""
GOAL = 5.5
"""GiB that are aimed at."""
PEER_BYTES_A_NUMBER = 2.4
"""What the peers' way was seen to take at most, of a model's numbers: 19.7 GiB for 8.03 billion."""
HERE = Path(__file__).resolve().parent

Case = dict[str, Any]


def main() -> int:
    args = arguments()
    layers = args.layers or _shards.SHAPES[args.shape].num_hidden_layers
    shape = dataclasses.replace(_shards.SHAPES[args.shape], num_hidden_layers=layers)
    with tempfile.TemporaryDirectory(prefix="hpcdl-bench-", dir=args.folder) as scratch:
        folder = shards_of(args, shape, Path(scratch), layers)
        cases = [*ours(args, folder, Path(scratch)), *peers(args, shape, folder, Path(scratch))]
    report = {
        "promise_gib": PROMISE,
        "goal_gib": GOAL,
        "shape": args.shape,
        "layers": layers,
        "parameters": _shards.parameters(shape),
        "seq_len": args.seq_len,
        "machine": {**machine(), "memory_gib": round(_rss.free_bytes()["total"] / GIB, 1)},
        "cases": cases,
    }
    mine = [case for case in cases if case["ours"]]
    goals = [(f"{case['case']}: below {PROMISE:g} GiB", bool(case.get("kept"))) for case in mine]
    return tell(report, as_text(report), goals, as_json=args.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", choices=sorted(_shards.SHAPES), default="llama3_8b", help="(default: %(default)s)"
    )
    parser.add_argument("--layers", type=int, help="blocks of the model (default: the shape's)")
    parser.add_argument(
        "--folder", type=Path, help="where everything goes: a disk with room (default: $TMPDIR)"
    )
    parser.add_argument(
        "--model", type=Path, help="folder of the shards, kept and used again (default: thrown away)"
    )
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a step (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="LoRA's (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=8, help="tokens to write at the end (default: %(default)s)"
    )
    parser.add_argument("--full", action="store_true", help="also train=full offload=stream, one step")
    parser.add_argument(
        "--peer-layers",
        type=int,
        metavar="N",
        help="blocks for the peers' way (default: as many; 0: leave it out)",
    )
    parser.add_argument("--only-peers", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="more for hpcdl launch, e.g. quant.head=int8"
    )
    return parser.parse_args()


def shards_of(args: argparse.Namespace, shape: _shards.Shape, scratch: Path, layers: int) -> Path:
    """The checkpoint: made, or found where it was made before."""
    folder = Path(args.model or scratch / f"{args.shape}-{layers}")
    _shards.make(folder, shape)
    return folder


def ours(args: argparse.Namespace, folder: Path, scratch: Path) -> list[Case]:
    """hpcdl: from the shards, from its cache, writing, and full-parameter training where asked for."""
    if args.only_peers:
        return []
    cases = []
    for name in ("hpcdl, from the shards", "hpcdl, from its cache"):
        case = launch(
            name, args, folder, scratch, ["+experiment=qlora_8b_under_8gb", f"peft.rank={args.rank}"]
        )
        cases.append(case)
        if "failed" in case:
            return cases
    cases.append(generate(args, Path(cases[-1]["run_dir"]), scratch))
    if args.full:
        more = ["+experiment=full_8b_under_8gb", "trainer.max_steps=1"]
        cases.append(launch("hpcdl, every parameter", args, folder, scratch, more))
    return cases


def launch(name: str, args: argparse.Namespace, folder: Path, scratch: Path, more: Sequence[str]) -> Case:
    """One run of hpcdl's main path."""
    argv = [
        *(sys.executable, "-m", "hpcdl.launch", f"trainer.max_steps={args.steps}", *more),
        *("cluster=local", f"model.path={folder}", "model.tokenizer=byte", f"data.seq_len={args.seq_len}"),
        *("force=true", "wait=true", *args.overrides),
    ]
    peak = _rss.measure(argv, environment(scratch), HERE.parent, scratch / "launch.log")
    progress(name, peak)
    case = {"case": name, "ours": True, "command": shlex.join(argv[1:]), **measured(peak)}
    run_dir = newest_run(scratch)
    if peak.code or run_dir is None:
        return {**case, "failed": peak.output.strip()[-1500:]}
    return {**case, **of_run(run_dir), "run_dir": str(run_dir)}


def generate(args: argparse.Namespace, run_dir: Path, scratch: Path) -> Case:
    """A process of its own that writes with the trained adapter."""
    argv = [
        *(sys.executable, "-m", "hpcdl", "generate", str(run_dir), "--json"),
        *("--prompt", "The Python statement", "--tokens", str(args.tokens)),
    ]
    peak = _rss.measure(argv, environment(scratch), HERE.parent, scratch / "generate.log")
    progress("hpcdl generate", peak)
    case = {
        "case": "hpcdl generate, from its cache",
        "ours": True,
        "command": shlex.join(argv[1:]),
        **measured(peak),
    }
    try:
        said = json.loads(peak.output[peak.output.index("{") :])
    except ValueError:
        return {**case, "failed": peak.output.strip()[-1500:]}
    return {**case, "load_s": said["load_s"], "tokens_per_s": said["tokens_per_s"], "text": said["text"]}


def environment(scratch: Path) -> dict[str, str]:
    """A cache and a folder of runs of our own."""
    return {"HPCDL_CACHE": str(scratch / "cache"), "HPCDL_RUNS": str(scratch / "runs"), "HF_HUB_OFFLINE": "1"}


def progress(name: str, peak: _rss.Peak) -> None:
    """A line when a case is over: the next ones take minutes."""
    print(
        f"{name}: exit code {peak.code}, {peak.seconds:.0f} s, peak {peak.rss_bytes / GIB:.2f} GiB",
        file=sys.stderr,
    )


def measured(peak: _rss.Peak) -> Case:
    """What was seen from outside."""
    return {
        "peak_rss_bytes": peak.rss_bytes,
        "peak_rss_at_s": round(peak.rss_at_s, 1),
        "peak_pss_bytes": peak.pss_bytes,
        "vmhwm_bytes": peak.vmhwm_highest,
        "wall_s": round(peak.seconds, 1),
        "kept": peak.code == 0 and max(peak.rss_bytes, peak.vmhwm_highest) < PROMISE * GIB,
    }


def newest_run(scratch: Path) -> Path | None:
    """The directory of the run that was launched last."""
    runs = [file.parent for file in (scratch / "runs").glob("*/*/spec.yaml")]
    return max(runs, key=lambda run: (run / "spec.yaml").stat().st_mtime, default=None)


def of_run(run_dir: Path) -> Case:
    """What the run itself noted: seconds of loading and of a step, tokens/s, what it holds, what it wrote."""
    events = lines(run_dir / "events.jsonl")
    result = json.loads((run_dir / "result.json").read_text())
    memory_file = run_dir / "memory.json"
    loaded = next((event for event in events if event["event"] == "loaded"), {})
    return {
        "load_s": loaded.get("seconds"),
        "step_s": round(result["train_s"] / result["steps"], 2),
        "tokens_per_s": result["tokens_per_s"],
        "loss_before": result["eval_loss_before"],
        "loss_after": result["eval_loss_after"],
        "text": result["sample"]["after"],
        "memory": json.loads(memory_file.read_text()) if memory_file.exists() else None,
    }


def lines(file: Path) -> list[dict[str, Any]]:
    """Records of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def moment(time_of_line: str) -> float:
    """Epoch seconds of ISO 8601."""
    return datetime.fromisoformat(time_of_line).timestamp()


# --- the peers' way ----------------------------------------------------------------------------------------


def peers(args: argparse.Namespace, shape: _shards.Shape, folder: Path, scratch: Path) -> list[Case]:
    """transformers + bitsandbytes + peft, with the same rank, targets and sequence."""
    layers = shape.num_hidden_layers if args.peer_layers is None else args.peer_layers
    if not layers:
        return []
    smaller = dataclasses.replace(shape, num_hidden_layers=layers)
    name = f"transformers + bitsandbytes + peft, {layers} layers"
    case: Case = {"case": name, "ours": False}
    need = PEER_BYTES_A_NUMBER * _shards.parameters(smaller) + GIB
    there = _rss.free_bytes()["available"]
    if there < need:
        said = f"needs about {need / GIB:.0f} GiB of memory, {there / GIB:.1f} are free: not started (--peer-layers N)"
        return [{**case, "failed": said}]
    if layers != shape.num_hidden_layers:
        folder = scratch / f"peers-{layers}"
        _shards.make(folder, smaller)
    argv = [
        *(sys.executable, str(HERE / "peers" / "qlora_transformers.py"), str(folder)),
        *("--seq-len", str(args.seq_len), "--rank", str(args.rank), "--steps", str(args.steps)),
        *("--tokens", str(args.tokens)),
    ]
    environ = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    peak = _rss.measure(argv, environ, HERE.parent, scratch / "peers.log")
    case |= measured(peak)
    if peak.code:
        return [{**case, "failed": peak.output.strip()[-1500:]}]
    said = next(line for line in reversed(peak.output.splitlines()) if line.startswith("{"))
    return [{**case, **json.loads(said)}]


# --- what is printed ---------------------------------------------------------------------------------------


def as_text(report: dict[str, Any]) -> str:
    """The table, and what stands beside it."""
    head = ("", "peak RSS", "PSS", "VmHWM", "load", "a step", "tokens/s", "whole run")
    rows = [row(case) for case in report["cases"]]
    text = [
        f"{report['shape']}, {report['layers']} layers: {report['parameters'] / 1e9:.2f} billion parameters,"
        f" seq {report['seq_len']}; memory in GiB",
        "",
        markdown(head, rows),
        "",
        "peak RSS, PSS: of all processes together, sampled from outside; VmHWM: the largest process, by the kernel.",
    ]
    for case in report["cases"]:
        if "failed" in case:
            text.append(f"{case['case']}: {case['failed']}")
        if case.get("memory"):
            text += ["", f"{case['case']}:", table_of(case["memory"])]
    mine = [case for case in report["cases"] if case["ours"]]
    if mine:
        most = max(max(case.get("peak_rss_bytes", 0), case.get("vmhwm_bytes", 0)) for case in mine) / GIB
        kept = all(case.get("kept") and "failed" not in case for case in mine)
        text += [
            "",
            f"promise: below {PROMISE:g} GiB: {'kept' if kept else 'MISSED'}; goal: at most {GOAL:g} GiB:"
            f" {'met' if kept and most <= GOAL else 'missed'} (highest of hpcdl's: {most:.2f} GiB)",
        ]
    return "\n".join([*text, f"{report['machine']}"])


def row(case: Case) -> list[str]:
    """A case's figures."""

    def gib(key: str) -> str:
        return f"{case[key] / GIB:.2f}" if case.get(key) else "-"

    def seconds(key: str) -> str:
        return f"{case[key]:.1f} s" if case.get(key) is not None else "-"

    speed = f"{case['tokens_per_s']:.1f}" if case.get("tokens_per_s") else "-"
    name = case["case"] + (" (FAILED)" if "failed" in case else "")
    memory = [gib(key) for key in ("peak_rss_bytes", "peak_pss_bytes", "vmhwm_bytes")]
    return [name, *memory, seconds("load_s"), seconds("step_s"), speed, seconds("wall_s")]


def table_of(record: dict[str, Any]) -> str:
    """memory.json as the run's log has it."""
    from hpcdl.runs import memory

    return memory.as_text(record)


if __name__ == "__main__":
    sys.exit(main())
