"""Drives the Slurm cluster in Docker as a user on its login node would: every call is a real command there."""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "docker" / "cluster"
T = TypeVar("T")

# Two real cores carry the whole cluster: a start of four workers alone takes half a minute there.
LIMIT_S = 300.0


@dataclass(frozen=True)
class Launched:
    """One line of `parsable=true`."""

    run_id: str
    job_id: str
    run_dir: str

    @property
    def array_id(self) -> str:
        return self.job_id.split("_")[0]


class Cluster:
    """A working directory of its own on the login node, and commands run in it."""

    def __init__(self, home: str) -> None:
        self.home = home

    def run(
        self, *command: str, check: bool = True, timeout: float = LIMIT_S
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command as the student; fails the test with its output where `check` and it failed."""
        done = subprocess.run(
            [CLUSTER, "run", "--cwd", self.home, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0 or not check, (
            f"{shlex.join(command)}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def shell(self, line: str, *, check: bool = True) -> str:
        """Runs a line of bash; returns what it printed."""
        return self.run("bash", "-c", line, check=check).stdout

    def root(self, service: str, line: str) -> str:
        """Runs a line of bash as root in one container: what an engineer of the cluster does."""
        done = subprocess.run(
            [CLUSTER, "exec", service, "bash", "-c", line],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout

    def launch(self, *overrides: str) -> list[Launched]:
        """`hpcdl launch … parsable=true`: the runs it made."""
        done = self.run("hpcdl", "launch", "cluster=slurm_docker", *overrides, "parsable=true")
        return [Launched(*line.split("\t")) for line in done.stdout.splitlines() if line.count("\t") == 2]

    def launch_one(self, *overrides: str) -> Launched:
        """The only run of a launch."""
        (launched,) = self.launch(*overrides)
        return launched

    def status(self, run: str) -> dict[str, Any]:
        """`hpcdl status RUN --json`."""
        return dict(json.loads(self.run("hpcdl", "status", run, "--json").stdout))

    def wait_state(self, run: str, *states: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
        """Polls the status until it is one of `states`; the test fails with the whole story otherwise."""

        def reached() -> dict[str, Any] | None:
            status = self.status(run)
            return status if status["state"] in states else None

        return self.until(reached, f"{run} in {states}", limit_s, story=lambda: self.story(run))

    def wait_done(self, runs: Iterable[Launched], limit_s: float = LIMIT_S) -> list[dict[str, Any]]:
        """All runs COMPLETED."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL")
        ended = [self.wait_state(run.run_id, *over, limit_s=limit_s) for run in runs]
        for status in ended:
            assert status["state"] == "COMPLETED", self.story(status["run_id"])
        return ended

    def wait_step(self, run: Launched, step: int) -> int:
        """Until the run has logged `step`."""

        def reached() -> int | None:
            status = self.status(run.run_id)
            assert status["state"] in ("PENDING", "RUNNING"), self.story(run.run_id)
            return int(status["step"]) if status["step"] >= step else None

        return self.until(
            reached, f"{run.run_id} at step {step}", LIMIT_S, story=lambda: self.story(run.run_id)
        )

    def until(
        self,
        reached: Callable[[], T | None],
        what: str,
        limit_s: float = LIMIT_S,
        story: Callable[[], str] = str,
    ) -> T:
        """Polls `reached` until it gives something."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            found = reached()
            if found is not None:
                return found
            time.sleep(1.0)
        raise AssertionError(f"not within {limit_s:.0f} s: {what}\n{story()}")

    def story(self, run: str) -> str:
        """Everything that explains a run, for the message of a failed test."""
        looks = (
            f"hpcdl status {run}",
            "tail -n 20 runs/*/*/events.jsonl",
            "tail -n 60 runs/*/*/logs/*",
            "tail -n 30 runs/.submissions/*/slurm-*.out",
            "squeue -a",
            "sinfo",
        )
        return self.shell("; ".join(looks), check=False)

    def lines(self, path: str) -> list[dict[str, Any]]:
        """A JSON-lines file of the shared disk."""
        return [json.loads(line) for line in self.shell(f"cat {shlex.quote(path)}").splitlines()]

    def losses(self, run: Launched) -> dict[int, float]:
        """Training loss by step."""
        return {
            line["step"]: line["loss"]
            for line in self.lines(f"{run.run_dir}/metrics.jsonl")
            if "loss" in line
        }

    def events(self, run: Launched, kind: str) -> list[dict[str, Any]]:
        """The run's events of one kind."""
        return [e for e in self.lines(f"{run.run_dir}/events.jsonl") if e["event"] == kind]
