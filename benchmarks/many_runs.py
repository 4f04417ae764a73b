#!/usr/bin/env python3
"""How quick are the looking commands where 10,000 runs lie in one folder, one of them a sweep of 1,000 points?

Makes the folder as launches and jobs leave it (state, spec, a few hundred steps, events, samples of some nodes), with
50 active runs in the queue of the tests' fake Slurm, and times whole commands, Python's start included. CPU time
stands beside wall time: where other work runs, it is what tells. --strace counts the system calls of each command.

    python benchmarks/many_runs.py
    python benchmarks/many_runs.py --keep ~/many --rounds 5     makes the folder there, or takes the one that is there
    python benchmarks/many_runs.py --latency-us 500    as on a shared disk where every open() takes half a millisecond
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from _many_runs import SWEEP, Made, make
from _results import Goal, tell
from _timing import Contender, ContenderError, machine, markdown, run_once

FAKE = Path(__file__).resolve().parent.parent / "tests" / "fake_slurm" / "bin"
OPENS = ("openat", "open")
STATS = ("newfstatat", "stat", "lstat", "statx", "access", "faccessat2")

SLOW = """
import builtins, io, os, time

def late(call):
    def waits(*args, **kwargs):
        time.sleep({seconds})
        return call(*args, **kwargs)
    return waits

os.open, os.scandir = late(os.open), late(os.scandir)
io.open = builtins.open = late(io.open)
"""
"""What a process with a slow disk does at its start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One command, and how long it may take."""

    words: tuple[str, ...]
    goal_s: float | None = None
    """Seconds; None: it is measured only."""


def main() -> int:
    args = arguments()
    with folder_of(args) as folder:
        made = make(folder, args.runs, args.points)
        questions = [one for one in asked(made, folder) if args.only in ("", one.words[0])]
        environment = {
            "HPCDL_RUNS": str(made.runs_dir),
            "FAKE_SLURM": str(made.slurm),
            "PATH": f"{FAKE}:{os.environ['PATH']}",
            **slow_disk(folder, args.latency_us),
        }
        rows = [measured(one, folder, environment, args) for one in questions]
    report = {"machine": machine(), "runs": args.runs, "points": args.points, "commands": rows}
    goals: list[Goal] = [
        (f"{row['command']}: at most {row['goal_s']} s; {row['wall_s']} s", (row["ratio"] or 0) <= 1)
        if row["wall_s"] is not None
        else (str(row["command"]), None)
        for row in rows
        if row["wall_s"] is None or row["goal_s"]
    ]
    return tell(report, as_text(report, rows), goals, as_json=args.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10_000, help="runs in all (default: %(default)s)")
    parser.add_argument(
        "--points", type=int, default=1_000, help="of them the sweep's (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="times that count (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the runs stay, for another time")
    parser.add_argument("--only", default="", metavar="COMMAND", help="status, logs, compare or report")
    parser.add_argument("--strace", action="store_true", help="count system calls, too")
    parser.add_argument(
        "--latency-us", type=int, default=0, metavar="N", help="every open() in Python waits so long"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser.parse_args()


@contextlib.contextmanager
def folder_of(args: argparse.Namespace) -> Iterator[Path]:
    """Where the runs are made."""
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        yield args.keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="hpcdl-bench-") as scratch:
        yield Path(scratch)


def asked(made: Made, folder: Path) -> list[Question]:
    """What people type."""
    page = ("report", SWEEP, "--out", str(folder / "report.html"))
    return [
        Question(words=("status",), goal_s=2.0),
        Question(words=("status", "--json")),
        Question(words=("status", made.run_id)),
        Question(words=("status", made.job_id)),
        Question(words=("status", made.name)),
        Question(words=("status", SWEEP)),
        Question(words=("logs", made.run_id)),
        Question(words=("compare", SWEEP)),
        Question(words=page, goal_s=5.0),
    ]


def slow_disk(folder: Path, latency_us: int) -> dict[str, str]:
    """An environment in which Python's own files are quick, and those that it opens are far away."""
    if not latency_us:
        return {}
    place = folder / "slow"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(SLOW.format(seconds=latency_us / 1e6))
    return {"PYTHONPATH": str(place)}


def measured(
    question: Question, folder: Path, environment: dict[str, str], args: argparse.Namespace
) -> dict[str, object]:
    """The medians over the rounds; a first one warms caches and doesn't count."""
    command = (
        sys.executable,
        "-c",
        "import sys; from hpcdl.cli import main; sys.exit(main())",
        *question.words,
    )
    contender = Contender(name=question.words[0], argv=command, cwd=folder, env=environment)
    try:
        samples = [run_once(contender) for _ in range(args.rounds + 1)][1:]
    except ContenderError as error:
        print(f"FAILED: hpcdl {' '.join(question.words)}: {error}", file=sys.stderr)
        return {"command": f"hpcdl {question.words[0]} FAILED", "wall_s": None, "cpu_s": None, "ratio": None}
    wall, cpu = (median(values) for values in zip(*((s.wall_s, s.cpu_s) for s in samples), strict=True))
    row: dict[str, object] = {
        "command": "hpcdl " + " ".join(question.words[:2]),
        "wall_s": round(wall, 3),
        "cpu_s": round(cpu, 3),
        "goal_s": question.goal_s,
        "ratio": round(wall / question.goal_s, 3) if question.goal_s else None,
    }
    if args.strace:
        row |= calls(command, folder, environment)
    return row


def calls(command: Sequence[str], folder: Path, environment: dict[str, str]) -> dict[str, int]:
    """System calls on files, those of Python's own start included."""
    counts = folder / "strace.txt"
    traced = ["strace", "-f", "-c", "-U", "calls,name", "-o", str(counts), *command]
    subprocess.run(
        traced, cwd=folder, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, check=True
    )
    found = {name: int(count) for count, name in re.findall(r"^\s*(\d+)\s+(\w+)$", counts.read_text(), re.M)}
    return {
        "opens": sum(found.get(name, 0) for name in OPENS),
        "stats": sum(found.get(name, 0) for name in STATS),
        "calls": found.get("total", 0),
    }


def as_text(report: dict[str, object], rows: Sequence[dict[str, object]]) -> str:
    """The table, with the ratios to the goals."""
    more = [key for key in ("opens", "stats", "calls") if key in rows[0]]
    head = ["command", "wall s", "CPU s", "goal s", "wall / goal", *more]
    lines = [
        [
            str(row["command"]),
            *(
                "-" if row.get(key) is None else f"{row[key]:.2f}"
                for key in ("wall_s", "cpu_s", "goal_s", "ratio")
            ),
            *(f"{row.get(key, 0):,}" for key in more),
        ]
        for row in rows
    ]
    title = f"{report['runs']} runs, a sweep of {report['points']} points, {report['machine']}"
    return f"{title}\n\n{markdown(head, lines)}"


if __name__ == "__main__":
    sys.exit(main())
