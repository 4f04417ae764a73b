"""The agent with the real torchrun: what the stand-in in fake_torch only imitates."""

from __future__ import annotations

import os
import signal

import pytest

from tests.launch.making import Agents, alive, until

pytest.importorskip("torch")
pytestmark = pytest.mark.torch


@pytest.fixture
def real(agents: Agents) -> Agents:
    agents.environment = {"PYTHONPATH": ""}
    return agents


def test_finished_with_ranks_in_the_log(real: Agents) -> None:
    run = real.make("finish")
    assert real.end(real.start(), limit_s=120) == (0, "")
    assert run.read_state().state == "COMPLETED"
    assert "[rank 0] hello 0\n" in real.log()
    assert "[rank 1] hello 1\n" in real.log()
    assert "[rank 1] to stderr\n" in real.log()


def test_signals_reach_the_workers_and_not_torchrun(real: Agents) -> None:
    run = real.make("wait")
    process = real.start()
    until(lambda: (run.path / "pid-1").exists() and (run.path / "pid-0").exists(), "workers", 120)
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        os.kill(real.torchrun(), number)  # as Slurm does: every process of the step
    assert alive(real.torchrun())
    process.send_signal(signal.SIGTERM)
    assert real.end(process, limit_s=120)[0] == 130
    assert run.read_state().reason == "stopped by SIGTERM; checkpoint saved at step 7"


def test_restart_and_root_cause(real: Agents) -> None:
    real.cluster = {"max_restarts": 1}
    run = real.make("twice")
    assert real.end(real.start(), limit_s=120)[0] == 1
    state = run.read_state()
    assert state.reason.startswith("ConnectionError: restart 1 (rank 1")
    assert state.restarts == 1


def test_a_killed_worker_is_named(real: Agents) -> None:
    real.cluster = {"max_restarts": 0}
    run = real.make("die")
    assert real.end(real.start(), limit_s=120)[0] == 128 + signal.SIGKILL
    assert run.read_state().reason.startswith(
        "SIGKILL: killed; by the kernel if memory ran out (rank 1, node "
    )
