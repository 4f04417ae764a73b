"""A checkpoint that takes longer than anybody's patience: torchrun alone would kill its workers after 30 s."""

from __future__ import annotations

import os
import signal

import pytest

from tests.fake_slurm import FakeSlurm
from tests.launch.making import Agents, until


def stop_everything(agents: Agents, slurm: FakeSlurm, save_s: float, limit_s: float) -> None:
    """What Slurm does: every process of the step gets the signal, then SIGTERM, again and again."""
    agents.cluster = {"kind": "slurm", "env": {"MODE": "save", "SAVE_S": str(save_s)}}
    run = agents.make("save")
    slurm.set(job_show="JobId=12 JobState=COMPLETING Reason=None Restarts=1")
    process = agents.node(0, 1)
    until(lambda: all((run.path / f"pid-{rank}").exists() for rank in (0, 1)), "every worker", 120)
    everyone = [*agents.pids(), agents.torchrun(), process.pid]
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM):
        for pid in everyone:
            os.kill(pid, number)
    assert agents.end(process, limit_s=limit_s + save_s)[0] == 0
    state = run.read_state()
    assert (state.state, state.requeues) == ("PENDING", 1)
    assert state.reason == "requeued by Slurm; checkpoint saved at step 7"


def test_nobody_cuts_a_save_off(agents: Agents, slurm: FakeSlurm) -> None:
    # Twice what the agent of the tests gives workers that torchrun has told to end.
    stop_everything(agents, slurm, 2.0, 30)


@pytest.mark.slow
@pytest.mark.torch
def test_torchruns_own_30_s_do_not_either(agents: Agents, slurm: FakeSlurm) -> None:
    pytest.importorskip("torch")
    agents.environment = {"PYTHONPATH": ""}
    stop_everything(agents, slurm, 40.0, 120)
