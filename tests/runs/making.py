"""Run directories made by hand, and a Slurm that answers from a table."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hpcdl.runs.files import append_line, write_json
from hpcdl.runs.hosts import task_indices
from hpcdl.runs.scheduler import Slurm
from hpcdl.runs.state import RunState
from hpcdl.runs.store import SUBMISSIONS, RunDir

TOKEN = "tok1"


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def make_run(runs_dir: Path, run_id: str = "aaaa11112222", **fields: Any) -> RunDir:
    """A run directory with this state; slurm runs of `job_id` get a submission too."""
    values: dict[str, Any] = {
        "run_id": run_id,
        "name": "tiny",
        "state": "PENDING",
        "kind": "slurm",
        "submission": TOKEN,
        "array_index": 0,
        "nodes": 1,
        "world_size": 2,
        "max_steps": 100,
        "created": ago(300),
        **fields,
    }
    run = RunDir(runs_dir / values["name"] / run_id)
    run.logs.mkdir(parents=True)
    run.write_state(RunState(**values), durable=False)
    return run


def make_submission(runs_dir: Path, token: str = TOKEN, **record: Any) -> Path:
    folder = runs_dir / SUBMISSIONS / token
    folder.mkdir(parents=True, exist_ok=True)
    values = {"token": token, "job_id": None, "kind": "slurm", "name": "tiny", "created": ago(300), **record}
    write_json(folder / "submission.json", values, durable=False)
    return folder


def add_steps(run: RunDir, steps: range, **more: Any) -> None:
    for step in steps:
        record = {"step": step, "loss": 4.0 - step / 50, "tokens_per_s": 1234.5, "step_s": 0.5, **more}
        append_line(run.metrics_file, record)


@dataclass
class FakeJob:
    """One line of the fake's table."""

    state: str
    tasks: str = "N/A"
    reason: str = "None"
    start: str = "N/A"
    nodes: str = ""
    comment: str = f"hpcdl:{TOKEN}"
    code: str = "0:0"
    forgotten: bool = False
    """Only sacct still knows it."""


@dataclass
class FakeSlurm:
    """Answers as squeue, scontrol, sacct and scancel of 22.05 do, from a table that tests change."""

    jobs: dict[str, list[FakeJob]] = field(default_factory=dict)
    away: bool = False
    accounting: bool = False
    calls: list[list[str]] = field(default_factory=list)

    def slurm(self) -> Slurm:
        return Slurm(runner=self.run)

    def run(self, command: Sequence[str], text: str, limit_s: float) -> subprocess.CompletedProcess[str]:
        self.calls.append(list(command))
        name = command[0]
        if name == "sacct":
            return self._sacct(command)
        if self.away:
            words = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
            return subprocess.CompletedProcess(command, 1, "", words)
        return {"squeue": self._squeue, "scontrol": self._scontrol, "scancel": self._scancel}[name](
            command, text
        )

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]

    def _known(self, ids: Sequence[str]) -> list[tuple[str, FakeJob]]:
        return [(i, job) for i in ids for job in self.jobs.get(i, []) if not job.forgotten]

    def _squeue(self, command: Sequence[str], text: str) -> subprocess.CompletedProcess[str]:
        if "-u" in command:
            lines = [f"{i}|{job.comment}" for i, job in self._known(list(self.jobs))]
            return subprocess.CompletedProcess(command, 0, "\n".join(lines) + "\n", "")
        ids = command[command.index("-j") + 1].split(",")
        known = self._known(ids)
        if not known and len(ids) == 1:
            return subprocess.CompletedProcess(
                command, 1, "", "slurm_load_jobs error: Invalid job id specified"
            )
        lines = [f"{i}|{j.tasks}|{j.state}|{j.start}|{j.nodes}|{j.reason}|{j.comment}" for i, j in known]
        return subprocess.CompletedProcess(command, 0, "\n".join(lines) + "\n", "")

    def _scontrol(self, command: Sequence[str], text: str) -> subprocess.CompletedProcess[str]:
        if "update" in command:
            return subprocess.CompletedProcess(command, 0, "", "")
        lines, errors = [], []
        for asked in re.findall(r"show job (\S+)", text):
            lines.append(f"scontrol: show job {asked}")
            known = self._known([asked])
            for number, (i, job) in enumerate(known):
                array = f"ArrayJobId={i} ArrayTaskId={job.tasks} " if job.tasks != "N/A" else ""
                lines.append(
                    f"JobId={int(i) + number} {array}JobName=a b UserId=student(1000) JobState={job.state} "
                    f"Reason={job.reason} ExitCode={job.code} StartTime={job.start} EndTime={job.start} "
                    f"NodeList={job.nodes or '(null)'} Comment={job.comment} "
                )
            if not known:
                errors.append("slurm_load_jobs error: Invalid job id specified")
        text = "".join(f"{line}\n" for line in lines)
        return subprocess.CompletedProcess(command, 1 if errors else 0, text, "\n".join(errors))

    def _sacct(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        if not self.accounting:
            return subprocess.CompletedProcess(command, 1, "", "Slurm accounting storage is disabled")
        ids = command[command.index("-j") + 1].split(",")
        lines = []
        for i in ids:
            for job in self.jobs.get(i, []):
                task = (
                    "" if job.tasks == "N/A" else f"_{job.tasks if job.tasks.isdigit() else f'[{job.tasks}]'}"
                )
                lines.append(f"{i}{task}|{job.state}|{job.code}|{job.start}|{job.start}|{job.nodes}")
        return subprocess.CompletedProcess(command, 0, "\n".join(lines) + "\n", "")

    def _scancel(self, command: Sequence[str], text: str) -> subprocess.CompletedProcess[str]:
        for job_id in command[1:]:
            base, _, task = job_id.partition("_")
            for job in self.jobs.get(base, []):
                ranges = task_indices(job.tasks)
                if not ranges or not task or job.tasks == task:
                    job.state = "CANCELLED"
        return subprocess.CompletedProcess(command, 0, "", "")
