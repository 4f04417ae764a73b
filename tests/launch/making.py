"""Requests, run directories and agents for the tests of hpcdl.launch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcdl.launch import template
from hpcdl.launch.base import JobRequest
from hpcdl.runs.parents import Parent
from hpcdl.runs.state import RunState
from hpcdl.runs.store import RunDir
from hpcdl.spec import ClusterSpec
from hpcdl.spec.plain import dump_yaml, to_plain

HERE = Path(__file__).parent
FAKE_TORCH = HERE / "fake_torch"
ANY_ADDRESS = HERE / "any_address"
AGENT = HERE / "agent.py"
SUPERVISOR = HERE / "supervisor.py"
TOKEN = "20260131-120000-ab12"
GOLDEN = HERE.parent / "golden"
ANSWERS, SILENT = "127.0.0.1", "127.0.0.2"
"""Addresses of nodes whose slurmd answers, and doesn't."""


def request(count: int = 1, *, runs_dir: Path = Path("/shared/runs"), **fields: Any) -> JobRequest:
    """A submission of `count` runs; the other fields are ClusterSpec's and JobRequest's own."""
    own = {k: fields.pop(k) for k in ("token", "name", "python", "code", "mounts") if k in fields}
    jobs = fields.pop("after_jobs", ())
    own["parents"] = tuple(Parent(run=None, name=f"job {job}", job_id=job) for job in jobs)
    values = {"token": TOKEN, "name": "lora", "python": "/shared/env/bin/python", **own}
    return JobRequest(
        cluster=ClusterSpec(**{"kind": "slurm", **fields}),
        runs_dir=runs_dir,
        run_dirs=tuple(runs_dir / "lora" / f"run{i}" for i in range(count)),
        **values,
    )


def golden(name: str, text: str) -> None:
    """Compares with tests/golden/<name>; HPCDL_GOLDEN=write writes it anew.

    What is the template's own text, word by word, stands there as one line.
    """
    file = GOLDEN / name
    for part, word in ((template.body(), "BODY"), (template.frame(), "FRAME")):
        text = text.replace(part.rstrip("\n"), f"{word} OF slurm/{template.NAME}")
    if os.environ.get("HPCDL_GOLDEN") == "write":
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


def make_runs(runs_dir: Path, cluster: ClusterSpec, count: int = 1, **state: Any) -> list[RunDir]:
    """Run directories as the launcher makes them, and their submission's runs.txt."""
    runs = []
    for index in range(count):
        run = RunDir(runs_dir / "lora" / f"run{index}")
        run.path.mkdir(parents=True)
        run.spec_file.write_text(dump_yaml({"name": "lora", "cluster": to_plain(cluster)}))
        values: dict[str, Any] = {
            "run_id": f"run{index}",
            "name": "lora",
            "state": "PENDING",
            "kind": cluster.kind,
            "submission": TOKEN,
            "array_index": index,
            "nodes": cluster.nodes,
            "world_size": cluster.world_size,
            "max_steps": 100,
            "created": "2026-01-31T12:00:00.000+00:00",
        }
        run.write_state(RunState(**{**values, **state}))
        runs.append(run)
    folder = runs_dir / ".submissions" / TOKEN
    folder.mkdir(parents=True)
    (folder / "runs.txt").write_text("".join(f"{run.path}\n" for run in runs))
    return runs


def until(condition: Callable[[], Any], what: str, limit_s: float = 30.0) -> Any:
    """Waits until the condition holds; its value."""
    deadline = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        time.sleep(0.02)
    return value


def alive(pid: int) -> bool:
    """Whether a process lives and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


@dataclass
class Agents:
    """Starts agents of one run, whose workers have no torch, and ends what is left of them."""

    runs_dir: Path
    cluster: dict[str, Any] = field(default_factory=dict)
    started: list[subprocess.Popen[str]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    meet_on_loopback: bool = False
    token: str = TOKEN
    """The submission that agents are started from."""
    run: RunDir = field(init=False)

    def make(self, mode: str, **state: Any) -> RunDir:
        """The run; each worker does what `mode` says (tiny_worker.py)."""
        values = {
            "kind": "local",
            "processes_per_node": 2,
            "max_restarts": 0,
            "env": {"MODE": mode},
            **self.cluster,
        }
        self.run = make_runs(self.runs_dir, ClusterSpec(**values), **state)[0]
        return self.run

    def start(self, *srun: str, **environment: str) -> subprocess.Popen[str]:
        """One agent; with srun's command the supervisor of all."""
        runs_file = self.runs_dir / ".submissions" / self.token / "runs.txt"
        words = [SUPERVISOR, runs_file, "--", *srun] if srun else [AGENT, runs_file]
        # This checkout's hpcdl, which need not be the installed one.
        path = [FAKE_TORCH, *([ANY_ADDRESS] if self.meet_on_loopback else ()), HERE.parents[1]]
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, path)),
                "TMPDIR": str(self.runs_dir),
                **self.environment,
                **environment,
            },
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def node(self, number: int, count: int, **environment: str) -> subprocess.Popen[str]:
        """One agent of a Slurm job, as srun starts it."""
        return self.start(**{**self._job(number, count), **environment})

    def job(self, count: int, **environment: str) -> subprocess.Popen[str]:
        """A Slurm job's batch step on its first node: it starts the agents through srun."""
        return self.start("srun", "--kill-on-bad-exit=1", **{**self._job(0, count), **environment})

    def _job(self, number: int, count: int) -> dict[str, str]:
        more = {"HPCDL_HEAD": "127.0.0.1", "HPCDL_PORT": "20123"} if count > 1 else {}
        return {
            "SLURM_JOB_ID": "12",
            "SLURM_ARRAY_JOB_ID": "12",
            "SLURM_ARRAY_TASK_ID": "0",
            "SLURM_NODEID": str(number),
            "SLURMD_NODENAME": f"n{number + 1}",
            "HPCDL_NODES": " ".join(f"n{i + 1}" for i in range(count)),
            **more,
        }

    def end(self, process: subprocess.Popen[str], limit_s: float = 40.0) -> tuple[int, str]:
        """Its exit code and what it said."""
        _, said = process.communicate(timeout=limit_s)
        return process.returncode, said

    def pids(self, ranks: int = 2) -> list[int]:
        """The workers' process ids, once all have said hello."""
        files = [self.run.path / f"pid-{rank}" for rank in range(ranks)]
        until(lambda: all(f.exists() and f.read_text() for f in files), "every worker has started")
        return [int(f.read_text()) for f in files]

    def log(self, name: str | None = None) -> str:
        """The log of one node, or of all."""
        return "".join(f.read_text() for f in sorted(self.run.logs.glob(f"{name or '*'}-try*.log")))

    def lines(self) -> list[re.Match[str]]:
        """The log's lines: time, writer, text."""
        found = [re.fullmatch(r"(\S+) \[([^]]+)\] (.*)", line) for line in self.log().splitlines()]
        assert all(found), self.log()
        return [line for line in found if line]

    def torchrun(self) -> int:
        """Process id of torchrun: the agent's child."""
        agent = self.started[-1].pid

        def look() -> list[str]:
            return Path(f"/proc/{agent}/task/{agent}/children").read_text().split()

        return int(until(look, "torchrun has started")[0])

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stderr:
                process.stderr.close()


def job_show(**more: str) -> str:
    """What `scontrol show job` says of a running job."""
    fields = {"JobState": "RUNNING", "Reason": "None", "Restarts": "0", "Partition": "debug"}
    plain = {"ReqNodeList": "(null)", "ExcNodeList": "(null)", **fields, **more}
    return "JobId=12 " + " ".join(f"{key}={value}" for key, value in plain.items())


def events(agents: Agents, kind: str) -> list[dict[str, Any]]:
    """Those of one kind."""
    return [event for event in agents.run.events() if event["event"] == kind]
