"""Texts as scontrol 22.05 wrote them on the real cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcdl.errors import SchedulerError
from hpcdl.launch import control
from hpcdl.launch.lost import LostAnswer
from hpcdl.runs.patience import Patience
from tests.fake_slurm import FakeSlurm

COMMON = "JobId=7 ArrayJobId=7 ArrayTaskId=0 JobName=probe.sh UserId=student(1000) "


@pytest.mark.parametrize(
    ("show", "fate"),
    [
        ("JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=0 ExitCode=0:0", "running"),
        ("JobState=COMPLETING Reason=None Requeue=1 Restarts=0 ExitCode=0:15", "cancelled"),
        ("JobState=COMPLETING Reason=TimeLimit Requeue=1 Restarts=0 ExitCode=0:15", "timeout"),
        ("JobState=COMPLETING Reason=None Requeue=1 Restarts=1 ExitCode=0:0", "requeued"),
        ("JobState=COMPLETING Reason=None Restarts=0 PreemptTime=2026-11-23T09:39:50", "preempted"),
        ("JobState=COMPLETING Reason=None Restarts=1 PreemptTime=2026-11-23T09:39:50", "requeued"),
        (
            "JobState=RUNNING Reason=None Restarts=0 PreemptEligibleTime=2026-11-23 PreemptTime=None",
            "running",
        ),
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
    assert control.requeue("7_0", 0).refused == "scontrol is not on this node's PATH"


def test_a_requeue_waits_for_a_controller_that_is_away(slurm: FakeSlurm) -> None:
    slurm.set(down=True)
    waited: list[float] = []
    patience = Patience(10.0, say=lambda _: None, sleep=waited.append, clock=lambda: sum(waited))
    assert "Unable to contact slurm controller" in control.requeue("7_0", 0, patience).refused
    assert sum(waited) == 10.0
    slurm.set(requeue_refused="Requested operation is presently disabled")
    assert after_a_while(slurm, "RUNNING", 0).refused == "Requested operation is presently disabled"


def test_a_job_that_has_a_newer_try_or_was_cancelled_meanwhile_is_not_queued_again(slurm: FakeSlurm) -> None:
    """The node was cut off until Slurm had given it up."""
    assert after_a_while(slurm, "RUNNING", 1) == control.Back(by_slurm=True)
    assert after_a_while(slurm, "CANCELLED", 0).refused == "the job was cancelled: CANCELLED"
    assert ["requeue", "7_0"] not in [call["argv"] for call in slurm.calls("scontrol")]


def after_a_while(slurm: FakeSlurm, state: str, restarts: int) -> control.Back:
    """Slurm answers the second time, and the job stands like this then."""

    def comes_back(delay: float) -> None:
        slurm.set(down=False, job_show=f"{COMMON}JobState={state} Reason=None Restarts={restarts}")

    slurm.set(down=True)
    return control.requeue("7_0", 0, Patience(100.0, say=lambda _: None, sleep=comes_back))


def test_sbatch_from_inside_a_job(slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("HPCDL_TEST_TOKEN", "hush")  # read from a file, say
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n")
    assert control.submit(script) == "1"
    (call,) = slurm.calls("sbatch")
    assert {k for k in call["environment"] if k.startswith("SLURM")} == {"SLURM_CONF"}
    assert "HPCDL_TEST_TOKEN" not in call["environment"]
    slurm.set(refuse="Batch job submission failed: Invalid partition name specified")
    with pytest.raises(SchedulerError, match="Invalid partition"):
        control.submit(script)
    slurm.set(refuse="Batch job submission failed: Socket timed out on send/recv operation")
    with pytest.raises(LostAnswer, match="Socket timed out"):
        control.submit(script)
