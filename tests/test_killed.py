"""kill -9 of any process at any moment: state.json stays readable, and is true after one poll."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]

VICTIMS = ("launcher", "agent", "torchrun", "worker")
MARKS = {
    "agent": "hpcdl.launch.job",
    "torchrun": "torch.distributed.run",
    "worker": "hpcdl.worker.main",
}
LIMIT_S = 90.0


def until(reached: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        found = reached()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {LIMIT_S:.0f} s: {what}")


def processes(runs: Path, role: str) -> list[psutil.Process]:
    """The processes of one role that belong to this test's run directory."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        line = " ".join(words)
        is_role = MARKS[role] in words
        if role == "torchrun":
            is_role = is_role and MARKS["agent"] not in words
        if role == "worker":
            is_role = is_role and MARKS["torchrun"] not in words
        if is_role and str(runs) in line and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A tiny run that would go on for hours, and isn't started anew."""
    command = [
        sys.executable, "-m", "hpcdl.launch", "+experiment=pretrain_tiny", "trainer.max_steps=1000000",
        "trainer.micro_batch_size=8",
        "trainer.checkpoint_every=0", "trainer.eval_samples=4", "cluster.processes_per_node=2",
        "cluster.max_restarts=0", f"runs_dir={tmp_path}/runs",
    ]  # fmt: skip
    with (tmp_path / "launcher.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=tmp_path)
    yield process
    for role in MARKS:
        for left in processes(tmp_path, role):
            left.kill()
    process.kill()
    process.wait()


def poll(runs: Path, run_dir: Path) -> dict[str, Any]:
    """One look by a user: `hpcdl status RUN --json`, which must also have made the file true."""
    done = subprocess.run(
        [sys.executable, "-m", "hpcdl", "status", run_dir.name, "--json"],
        env={**os.environ, "HPCDL_RUNS": str(runs)},
        capture_output=True,
        text=True,
        check=True,
    )
    status = dict(json.loads(done.stdout))
    # The file may have moved on since the answer, but an end that was told stands in it.
    stands = json.loads((run_dir / "state.json").read_text())["state"]
    assert stands == status["state"] or status["state"] in ("PENDING", "RUNNING")
    return status


class Reader(threading.Thread):
    """Reads state.json as fast as it can, and keeps what it could not read."""

    def __init__(self, file: Path) -> None:
        super().__init__(daemon=True)
        self.file = file
        self.torn: list[str] = []
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            text = self.file.read_text()
            try:
                json.loads(text)
            except ValueError:
                self.torn.append(text)
            time.sleep(0.001)


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("when", ["starting", "training"])
def test_killed(victim: str, when: str, launcher: subprocess.Popen[bytes], tmp_path: Path) -> None:
    dice = random.Random(f"{victim} {when}")
    runs = tmp_path / "runs"
    state_file = until(lambda: next(runs.glob("*/*/state.json"), None), "a run directory")
    run_dir = state_file.parent
    reader = Reader(state_file)
    reader.start()
    if when == "training":
        until(lambda: (run_dir / "metrics.jsonl").exists(), "the first line of metrics")
    target = (
        psutil.Process(launcher.pid)
        if victim == "launcher"
        else dice.choice(until(lambda: processes(tmp_path, victim), f"a process of the {victim}"))
    )
    time.sleep(dice.uniform(0, 0.5))  # a moment nobody chose
    target.send_signal(signal.SIGKILL)

    if victim == "launcher":
        # The agent owns the run: it goes on, and the state says so.
        status = until(lambda: _with_state(poll(runs, run_dir), "RUNNING"), "RUNNING")
        assert processes(tmp_path, "agent"), status
        until(lambda: poll(runs, run_dir)["step"] > 0, "a step after the launcher's end")
        cancel = [sys.executable, "-m", "hpcdl", "cancel", run_dir.name]
        subprocess.run(cancel, env={**os.environ, "HPCDL_RUNS": str(runs)}, check=True, capture_output=True)
        assert poll(runs, run_dir)["state"] == "CANCELLED"
    else:
        status = until(lambda: _with_state(poll(runs, run_dir), "FAILED"), "FAILED")
        assert status["reason"] and status["ended"]
        assert launcher.wait(timeout=LIMIT_S) == 1, (tmp_path / "launcher.log").read_text()
    for role in MARKS:
        until(lambda role=role: not processes(tmp_path, role), f"no {role} left")
    reader.stop.set()
    reader.join()
    assert reader.torn == []


def _with_state(status: dict[str, Any], state: str) -> dict[str, Any] | None:
    return status if status["state"] == state else None
