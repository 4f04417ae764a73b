"""Texts as scontrol 22.05 wrote them on the real cluster."""

from __future__ import annotations

import pytest

from hpcdl.launch import control
from tests.fake_slurm import FakeSlurm

COMMON = "JobId=7 ArrayJobId=7 ArrayTaskId=0 JobName=probe.sh UserId=student(1000) "


@pytest.mark.parametrize(
    ("show", "fate"),
    [
        ("JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=0 ExitCode=0:0", "running"),
        ("JobState=COMPLETING Reason=None Requeue=1 Restarts=0 ExitCode=0:15", "cancelled"),
        ("JobState=COMPLETING Reason=TimeLimit Requeue=1 Restarts=0 ExitCode=0:15", "timeout"),
        ("JobState=COMPLETING Reason=None Requeue=1 Restarts=1 ExitCode=0:0", "requeued"),
        ("JobState=PENDING Reason=BeginTime Requeue=1 Restarts=1 ExitCode=0:0", "requeued"),
        ("JobState=CANCELLED Reason=None Restarts=0 ExitCode=0:15", "cancelled"),
        ("JobState=CONFIGURING Reason=None Restarts=0", "unknown"),
    ],
)
def test_what_slurm_is_doing(slurm: FakeSlurm, show: str, fate: str) -> None:
    slurm.set(job_show=COMMON + show)
    assert control.ask("7_0", 0).fate == fate


def test_restarts_before_this_try_are_not_a_requeue(slurm: FakeSlurm) -> None:
    slurm.set(job_show=COMMON + "JobState=RUNNING Reason=None Restarts=2")
    assert control.ask("7_0", 2).fate == "running"


def test_no_answer_is_not_a_fate(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.set(down=True)
    assert control.ask("7_0", 0) == control.JobFate(
        fate="unknown", words="scontrol: error: Unable to contact slurm controller (connect failure)"
    )
    monkeypatch.setenv("PATH", "/nowhere")
    assert control.ask("7_0", 0).words == "scontrol is not on this node's PATH"
    assert control.requeue("7_0") == "scontrol is not on this node's PATH"
