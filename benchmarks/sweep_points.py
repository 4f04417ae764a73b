#!/usr/bin/env python3
"""What a sweep of 1,000 points costs: composed, validated, run directories written, submitted.

Beside it, measured in the same round: submitit's own `map_array` of as many trivial functions, and Hydra's own
`compose` for the same points. The sbatch that answers is a fake one (it says "Submitted batch job 1"), so that
only the launchers' own work counts; --real submits held jobs to the cluster at hand and cancels them.

    python benchmarks/sweep_points.py
    python benchmarks/sweep_points.py --all      composes all points with Hydra, too (minutes), not every tenth
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from _results import tell
from _timing import Contender, machine, markdown, paired_ratio, run_once

GOAL = 0.25
"""hpcdl may take this many times what submitit and Hydra take together."""
CONF = Path(__file__).resolve().parent.parent / "conf"
CHOICES = ("+experiment=pretrain_tiny", "cluster=slurm")
EVERY = 10
"""Of so many points Hydra composes one, and its time counts as often; --all: each."""


def main() -> int:
    args = arguments()
    if args.part:
        print(PARTS[args.part](args))
        return 0
    with tempfile.TemporaryDirectory(prefix="hpcdl-bench-") as scratch:
        environment = {} if args.real else fake_slurm(Path(scratch))
        rounds = [one_round(args, Path(scratch) / str(n), environment) for n in range(args.rounds + 1)][1:]
    report = summary(args, rounds)
    ratio = report["ratio"]
    assert isinstance(ratio, float)
    goal = f"at most {GOAL} × what submitit and Hydra take together; {report['ratio_text']}"
    return tell(report, as_text(report), [(goal, ratio <= GOAL)], as_json=args.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=1000, help="points of the sweep (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="let Hydra compose every point")
    parser.add_argument("--real", action="store_true", help="the cluster's own sbatch: held jobs, cancelled")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    return parser.parse_args()


def values(points: int) -> list[str]:
    """The learning rates of the sweep."""
    return [f"{(number + 1) * 1e-6:.6f}" for number in range(points)]


def fake_slurm(folder: Path) -> dict[str, str]:
    """An environment with an sbatch that accepts everything."""
    commands = folder / "bin"
    commands.mkdir()
    for name, answer in (("sbatch", "Submitted batch job 1"), ("srun", ""), ("squeue", ""), ("sacct", "")):
        (commands / name).write_text(f"#!/bin/sh\necho '{answer}'\n")
        (commands / name).chmod(0o755)
    return {"PATH": f"{commands}:{os.environ['PATH']}"}


def one_round(args: argparse.Namespace, folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Seconds of each part."""
    folder.mkdir()
    seconds = {"hpcdl": hpcdl(args, folder, environment)}
    for part in PARTS:
        seconds[part] = in_a_process(part, args, folder, environment)
    return seconds


def hpcdl(args: argparse.Namespace, folder: Path, environment: dict[str, str]) -> float:
    """The whole process, from its start to its end; then whether it did what it should."""
    runs = folder / "runs"
    hold = ("cluster.extra=[--hold]",) if args.real else ()
    sweep = ("-m", *CHOICES, *hold, f"optim.lr={','.join(values(args.points))}", f"runs_dir={runs}")
    command = (sys.executable, "-m", "hpcdl.launch", *sweep)
    sample = run_once(Contender(name="hpcdl", argv=command, cwd=folder, env=environment))
    states = [json.loads(file.read_text()) for file in runs.glob("*/*/state.json")]
    if len(states) != args.points or any(state["state"] != "PENDING" for state in states):
        raise SystemExit(f"hpcdl made {len(states)} runs of {args.points}")
    if args.real:
        for record in runs.glob(".submissions/*/submission.json"):
            cancel(json.loads(record.read_text())["job_id"])
    return sample.wall_s


def in_a_process(part: str, args: argparse.Namespace, folder: Path, environment: dict[str, str]) -> float:
    """A part in a fresh Python, which prints what it measured: its imports don't count."""
    flags = [flag for flag, on in (("--all", args.all), ("--real", args.real)) if on]
    command = [sys.executable, __file__, "--part", part, "--points", str(args.points), *flags]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{part}: exit code {done.returncode}\n{done.stderr}")
    return float(done.stdout.split()[-1])


def submitit_part(args: argparse.Namespace) -> float:
    """submitit's map_array, from the call to its return."""
    import submitit

    executor = submitit.SlurmExecutor(folder="submitit")
    executor.update_parameters(array_parallelism=100, time=60)
    if args.real:
        executor.update_parameters(additional_parameters={"hold": True})
    started = time.perf_counter()
    jobs = executor.map_array(trivial, range(args.points))
    taken = time.perf_counter() - started
    if args.real:
        cancel(jobs[0].job_id.partition("_")[0])
    shutil.rmtree("submitit")
    return taken


def trivial(number: int) -> int:
    return number


def hydra_part(args: argparse.Namespace) -> float:
    """Hydra's compose, once a point."""
    from hydra import compose, initialize_config_dir

    points = values(args.points)
    composed = points if args.all else points[::EVERY]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose("config", [*CHOICES])
        started = time.perf_counter()
        for value in composed:
            compose("config", [*CHOICES, f"optim.lr={value}"])
        return (time.perf_counter() - started) * len(points) / len(composed)


PARTS: dict[str, Callable[[argparse.Namespace], float]] = {
    "submitit": submitit_part,
    "hydra": hydra_part,
}


def cancel(job_id: str) -> None:
    subprocess.run(["scancel", job_id], check=True)


def summary(args: argparse.Namespace, rounds: Sequence[dict[str, float]]) -> dict[str, object]:
    """Medians, and the ratio taken within each round."""
    both = [one["submitit"] + one["hydra"] for one in rounds]
    ratio = paired_ratio([one["hpcdl"] for one in rounds], both)
    strict = paired_ratio(
        [one["hpcdl"] for one in rounds], [GOAL * one["submitit"] + one["hydra"] for one in rounds]
    )
    return {
        "machine": machine(),
        "points": args.points,
        "rounds": len(rounds),
        "hydra_composed": args.points if args.all else len(values(args.points)[::EVERY]),
        "slurm": "real" if args.real else "fake sbatch",
        "seconds": {part: round(median(one[part] for one in rounds), 2) for part in rounds[0]},
        "ratio": round(ratio.median, 4),
        "ratio_text": str(ratio),
        "of_quarter_submitit_plus_hydra": str(strict),
    }


def as_text(report: dict[str, object]) -> str:
    seconds = report["seconds"]
    assert isinstance(seconds, dict)
    composed = f"Hydra composed {report['hydra_composed']} of {report['points']} points"
    rows = [
        ["hpcdl: compose, validate, write, submit", f"{seconds['hpcdl']:.2f}"],
        ["submitit: map_array of trivial functions", f"{seconds['submitit']:.2f}"],
        ["Hydra: compose for each point", f"{seconds['hydra']:.2f}"],
    ]
    return "\n".join(
        [
            f"{report['points']} points, {report['rounds']} rounds, {report['slurm']}, {report['machine']}",
            "",
            markdown(["median", "s"], rows),
            "",
            f"hpcdl / (submitit + Hydra): {report['ratio_text']}   goal: at most {GOAL}",
            f"hpcdl / ({GOAL} × submitit + Hydra): {report['of_quarter_submitit_plus_hydra']}   at most 1",
            f"({composed}; its time is scaled to all)",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
