#!/usr/bin/env python3
"""How soon a Slurm job's own code runs: hpcdl beside a hand-written sbatch + srun + torchrun script.

    docker/cluster up && python benchmarks/slurm_start.py      on the cluster in Docker
    python benchmarks/slurm_start.py --partition short         on the login node of a real cluster

Both jobs train the same tiny Llama on the same text with the same resources, one after the other, in pairs.
Both carry the same probe (benchmarks/probe), which notes when each Python process runs its first line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from _jobs import HAND, HPCDL, MARKS, Job, Trial, run_trial, wait_for_quiet
from _results import Goal, tell
from _timing import machine, mark, markdown, paired_ratio

GOAL = 1.10
"""hpcdl may take this many times what the hand-written job takes."""
CLUSTER = Path(__file__).resolve().parent.parent / "docker" / "cluster"
CHECKOUT_IN_CLUSTER = "/hpcdl"
"""Where docker/compose.yaml mounts the checkout."""
SPANS = tuple(
    (start, end) for start in ("command", "sbatch", "batch") for end in ("first_line", "first_step")
)
JUDGED = (("sbatch", "first_line"), ("sbatch", "first_step"))


def main() -> int:
    args = arguments()
    if shutil.which("sbatch") is None:
        report = in_docker()
    else:
        report = {"machine": machine(), "settings": [setting(args, nodes) for nodes in args.nodes]}
    return tell(report, as_text(report), goals(report), as_json=args.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5, help="pairs of jobs (default: %(default)s)")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--processes", type=int, default=2, help="on each node (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="training steps (default: %(default)s)")
    parser.add_argument("--partition", default="debug", help="default: %(default)s")
    parser.add_argument("--keep", action="store_true", help="keep the jobs' files, and say where they are")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser.parse_args()


def in_docker() -> dict[str, Any]:
    """What this very script says on the login node of the cluster in Docker."""
    script = f"{CHECKOUT_IN_CLUSTER}/benchmarks/slurm_start.py"
    options = [word for word in sys.argv[1:] if word != "--json"]
    command = [CLUSTER, "run", "python", script, *options, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if "{" not in done.stdout:
        raise SystemExit(f"no result from the cluster: {done.stdout}")
    report: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return report


def setting(args: argparse.Namespace, nodes: int) -> dict[str, Any]:
    """All pairs on one number of nodes."""
    job = Job(nodes=nodes, processes=args.processes, steps=args.steps, partition=args.partition)
    # In the home folder: the nodes must see it.
    folder = Path(tempfile.mkdtemp(prefix="hpcdl-bench-", dir=Path.home()))
    trials: dict[str, list[Trial]] = {HAND: [], HPCDL: []}
    for pair in range(-1, args.pairs):  # pair -1 warms the page cache and isn't counted
        for kind in (HAND, HPCDL) if pair % 2 else (HPCDL, HAND):
            wait_for_quiet()
            trial = run_trial(kind, job, folder / f"{kind}{pair}")
            progress(kind, nodes, pair, trial)
            if pair >= 0:
                trials[kind].append(trial)
    if args.keep:
        print(f"kept: {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return {"job": asdict(job), "spans": spans(trials), "phases": phases(trials)}


def progress(kind: str, nodes: int, pair: int, trial: Trial) -> None:
    marks = " ".join(f"{mark} {at - trial['command']:.2f}" for mark, at in trial.items())
    print(f"{nodes} node(s), pair {pair}, {kind}: {marks}", file=sys.stderr, flush=True)


def spans(trials: dict[str, list[Trial]]) -> list[dict[str, Any]]:
    """From each beginning to each end: medians of both, and the ratio within the pairs."""
    lines = []
    for start, end in SPANS:
        hand = [trial[end] - trial[start] for trial in trials[HAND]]
        ours = [trial[end] - trial[start] for trial in trials[HPCDL]]
        ratio = paired_ratio(ours, hand)
        lines.append(
            {
                "from": start,
                "to": end,
                "hand_written_s": median(hand),
                "hpcdl_s": median(ours),
                "ratio": asdict(ratio),
                "met": (start, end) not in JUDGED or ratio.median <= GOAL,
            }
        )
    return lines


def phases(trials: dict[str, list[Trial]]) -> dict[str, dict[str, float]]:
    """Where the time goes: the median of each mark, in seconds since the batch script began."""
    return {
        kind: {
            mark: median(trial[mark] - trial["batch"] for trial in done if mark in trial)
            for mark in MARKS
            if any(mark in trial for trial in done)
        }
        for kind, done in trials.items()
    }


def as_text(report: dict[str, Any]) -> str:
    parts = [f"{report['machine']}; medians; ratios within pairs, with their quartiles"]
    for part in report["settings"]:
        job = part["job"]
        parts.append(f"{job['nodes']} node(s) × {job['processes']} processes")
        parts.append(span_table(part["spans"]))
        parts.append(phase_table(part["phases"]))
    parts += [f"goal: {words}" for words, _ in goals(report)]
    return "\n\n".join(parts)


def span_table(lines: list[dict[str, Any]]) -> str:
    head = ["from → to", "hand-written s", "hpcdl s", "ratio", "n", ""]
    rows = []
    for line in lines:
        ratio = line["ratio"]
        spread = f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"
        times = [f"{line[key]:.2f}" for key in ("hand_written_s", "hpcdl_s")]
        rows.append(
            [
                f"{line['from']} → {line['to']}",
                *times,
                spread,
                str(ratio["n"]),
                mark(ratio["low"], ratio["high"]),
            ]
        )
    return markdown(head, rows)


def phase_table(by_kind: dict[str, dict[str, float]]) -> str:
    head = ["seconds since the batch script began", *by_kind]
    rows = [
        [mark, *(f"{marks[mark]:.2f}" if mark in marks else "-" for marks in by_kind.values())]
        for mark in MARKS
        if any(mark in marks for marks in by_kind.values())
    ]
    return markdown(head, rows)


def goals(report: dict[str, Any]) -> list[Goal]:
    """From sbatch to the first line and to the first step."""
    return [
        (
            f"{part['job']['nodes']} node(s) × {part['job']['processes']}, {line['from']} → {line['to']}:"
            f" at most {GOAL}; {line['ratio']['median']:.2f}, {judge(line['ratio'])}",
            line["met"],
        )
        for part in report["settings"]
        for line in part["spans"]
        if (line["from"], line["to"]) in JUDGED
    ]


def judge(ratio: dict[str, Any]) -> str:
    """By the median; where the quartiles lie on both sides of the goal, the machine was too busy to tell."""
    word = "met" if ratio["median"] <= GOAL else "MISSED"
    return f"{word}, but the spread covers both" if ratio["low"] <= GOAL < ratio["high"] else word


if __name__ == "__main__":
    sys.exit(main())
