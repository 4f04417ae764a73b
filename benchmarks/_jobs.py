"""The two Slurm jobs that slurm_start.py compares, and what the probe noted of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
HAND, HPCDL = "hand_written", "hpcdl"
LIMIT_S = 180
"""A job that is not done after this is cancelled; it counts if it has come to its first step."""
QUIET_LIMIT_S = 180
"""How long other jobs of the cluster are waited for."""

MARKS = ("command", "sbatch", "batch", "agent", "torchrun", "worker", "first_line", "evaluated", "first_step")
"""What a trial notes, in order: the command's start; the call of sbatch; the batch script's first line; the
start of hpcdl's node agent, of torchrun, of the first worker (before any import); the worker's first
line; the end of the evaluation before training; the end of the first step."""
PROGRAMS = {
    "agent": ("hpcdl/launch/job",),
    "torchrun": ("torch/distributed/run", "bin/torchrun"),
    "worker": ("hpcdl/worker/main", "hand_written/train.py"),
}

Trial = dict[str, float]
"""Epoch seconds by mark."""


class TrialError(Exception):
    """A job failed: its times would mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What both jobs ask for and do."""

    nodes: int
    processes: int
    """On each node."""
    steps: int
    partition: str

    def hand_written(self, out: Path) -> list[str]:
        """sbatch with a plain script."""
        folder = HERE / "hand_written"
        options = [
            f"--nodes={self.nodes}",
            f"--cpus-per-task={self.processes}",
            f"--partition={self.partition}",
        ]
        work = ["--max-steps", str(self.steps), "--out", str(out)]
        log = f"--output={out}/job.log"
        script = [str(folder / "job.sbatch"), str(self.processes), str(folder / "train.py")]
        return ["sbatch", "--parsable", *options, log, *script, *work]

    def hpcdl(self, out: Path) -> list[str]:
        """hpcdl's launcher, with the same figures."""
        return [
            *(sys.executable, "-m", "hpcdl.launch", "+experiment=pretrain_tiny", "cluster=slurm"),
            *(f"cluster.nodes={self.nodes}", f"cluster.processes_per_node={self.processes}"),
            *("cluster.cpus_per_process=1", f"cluster.partition={self.partition}", "cluster.time_min=30"),
            """cluster.setup=['date +%s.%N >"$BENCH_PROBE/batch"']""",
            *(f"trainer.max_steps={self.steps}", "trainer.micro_batch_size=4", "task.sample_tokens=0"),
            *(f"runs_dir={out}", "parsable=true"),
        ]


def run_trial(kind: str, job: Job, folder: Path) -> Trial:
    """Submits one job, waits for its end, reads what was noted.

    Raises:
        TrialError: it could not be submitted, or never came to its first step.
    """
    probe, out = folder / "probe", folder / "out"
    probe.mkdir(parents=True)
    out.mkdir()
    env = {
        **os.environ,
        "BENCH_PROBE": str(probe),
        "BENCH_WORKERS": ":".join(PROGRAMS["worker"]),
        "PYTHONPATH": str(HERE / "probe"),
        "PATH": f"{HERE / 'probe' / 'bin'}:{os.environ['PATH']}",
    }
    argv = job.hand_written(out) if kind == HAND else job.hpcdl(out)
    started = time.time()
    done = subprocess.run(argv, env=env, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise TrialError(f"{' '.join(argv)}: exit code {done.returncode}\n{done.stderr}{done.stdout}")
    words = done.stdout.split()
    job_id, run_dir = (words[0], out) if kind == HAND else (words[1], Path(words[2]))
    wait_for_end(job_id)
    return {"command": started, **noted(probe), **trained(run_dir)}


def wait_for_end(job_id: str) -> None:
    """Polls squeue until the job is gone from it; cancels one that does not end.

    What is measured lies before the end: torch now and then hangs when it takes its process group down. The
    trial then counts, and the hang is told. Without a first step, `trained` raises.
    """
    deadline = time.monotonic() + LIMIT_S
    cancelled = False
    while squeue("--jobs", job_id):
        if time.monotonic() > deadline and not cancelled:
            print(f"note: job {job_id} had not ended after {LIMIT_S} s: cancelled", file=sys.stderr)
            subprocess.run(["scancel", job_id], check=False)
            cancelled = True
        if time.monotonic() > deadline + LIMIT_S:
            raise TrialError(f"job {job_id} is still there {LIMIT_S} s after scancel")
        time.sleep(0.5)


def wait_for_quiet() -> None:
    """Other people's jobs would be measured with ours: waits for them, and says so if they stay."""
    deadline = time.monotonic() + QUIET_LIMIT_S
    while (others := squeue("--states", "RUNNING,COMPLETING,CONFIGURING")) and time.monotonic() < deadline:
        time.sleep(1)
    if others:
        print(f"note: {len(others)} other job(s) ran at the same time", file=sys.stderr)


def squeue(*options: str) -> list[str]:
    """The jobs that squeue lists; none for a job that it has forgotten."""
    done = subprocess.run(
        ["squeue", "--noheader", "--format=%i %T", *options], capture_output=True, text=True
    )
    return done.stdout.split("\n")[:-1]


def noted(probe: Path) -> Trial:
    """What the probe wrote, as marks; of several processes of a kind the first one counts."""
    marks = {name: float((probe / name).read_text()) for name in ("sbatch", "batch")}
    notes = [json.loads(file.read_text()) for file in probe.glob("*.json")]
    for kind, programs in PROGRAMS.items():
        mine = [note for note in notes if note["program"].endswith(programs)]
        if mine:
            marks[kind] = min(note["interpreter"] for note in mine)
        if kind == "worker":
            marks["first_line"] = min(note["first_line"] for note in mine)
    return {mark: marks[mark] for mark in MARKS if mark in marks}


def trained(run_dir: Path) -> Trial:
    """When the evaluation before training and the first step ended, by the run's own metrics.

    Raises:
        TrialError: there is no first step.
    """
    file = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    steps = [moment(line["time"]) for line in lines if "loss" in line and line["step"] == 1]
    if not steps:
        raise TrialError(f"{run_dir}: no first step in metrics.jsonl")
    evaluated = [moment(line["time"]) for line in lines if "eval_loss" in line and line["step"] == 0]
    return {**({"evaluated": evaluated[0]} if evaluated else {}), "first_step": steps[0]}


def moment(time_of_line: float | str) -> float:
    """Epoch seconds; hpcdl writes ISO 8601."""
    return datetime.fromisoformat(time_of_line).timestamp() if isinstance(time_of_line, str) else time_of_line
