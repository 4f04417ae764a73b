"""Under the real torchrun: nobody outlives it, and a failure is its exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpcdl.runs.store import RunDir
from hpcdl.spec.plain import dump_yaml, to_plain
from tests.factory import tiny_spec
from tests.worker.conftest import until

pytestmark = pytest.mark.torch


def torchrun(run: RunDir, **dotted: Any) -> subprocess.Popen[bytes]:
    run.path.mkdir()
    run.spec_file.write_text(dump_yaml(to_plain(tiny_spec(**dotted))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(
        [*command, "-m", "hpcdl.worker.main", str(run.path)],
        env=env, stdout=subprocess.DEVNULL, stderr=(run.path / "log.txt").open("wb"),
    )  # fmt: skip


def test_killed_torchrun_leaves_no_worker(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    agent = torchrun(run, trainer__max_steps=100_000)
    try:
        until(lambda: run.step() >= 2 or agent.poll() is not None, "the second step")
        workers = psutil.Process(agent.pid).children(recursive=True)
        assert sum("hpcdl.worker.main" in " ".join(w.cmdline()) for w in workers) == 2
    finally:
        agent.send_signal(signal.SIGKILL)
        agent.wait()
    until(
        lambda: not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers),
        "no worker",
        20,
    )


def test_failure_is_torchruns_exit_code(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert torchrun(run, model__path="/nonexistent").wait(timeout=180) == 1
    assert sorted(p.name for p in run.errors.iterdir())[0].startswith("try0.0-restart0-rank")
