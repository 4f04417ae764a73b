from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hpcdl.errors import SchedulerError
from hpcdl.runs import patience
from hpcdl.runs.cancel import How, cancel
from hpcdl.runs.reconcile import look
from hpcdl.runs.store import now
from tests.runs.making import FakeJob, FakeSlurm, make_run


def test_pending(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, job_id="4_1", array_index=1)
    sibling = make_run(runs_dir, "bbbb", job_id="4_0")
    fake.jobs["4"] = [FakeJob("RUNNING", "0"), FakeJob("PENDING", "1")]
    said: list[str] = []
    (view,) = cancel([run], How(), said.append, slurm=fake.slurm(), poll_s=0.01)
    assert ["scancel", "4_1"] in fake.calls
    assert run.read_state().state == view.state.state == "CANCELLED"
    assert said == [f"{run.path.name} CANCELLED: cancelled while pending; it will never write a log"]
    assert sibling.read_state().state == "PENDING"
    assert not run.stop_file.exists()


def test_running_saves_first(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, state="RUNNING", job_id="4_1", array_index=1)
    sibling, task = FakeJob("RUNNING", "0"), FakeJob("RUNNING", "1")
    fake.jobs["4"] = [sibling, task]
    asked: list[str] = []

    def workers() -> None:
        while not run.stop_file.exists():
            time.sleep(0.01)
        asked.append(run.stop_file.read_text().split()[0])
        assert "scancel" not in fake.names(), "only after the workers have saved"
        run.update(state="CANCELLED", reason="cancel; checkpoint saved at step 7", exit_code=130)

    thread = threading.Thread(target=workers, daemon=True)
    thread.start()
    said: list[str] = []
    cancel([run], How(limit_s=20), said.append, slurm=fake.slurm(), poll_s=0.01)
    thread.join(timeout=20)
    assert asked == ["cancel"]
    assert said[-1].endswith("CANCELLED: cancel; checkpoint saved at step 7")
    assert ["scancel", "4_1"] in fake.calls
    assert sibling.state == "RUNNING"


def test_workers_that_do_not_stop_are_ended_by_scancel(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, state="RUNNING", job_id="4_0")
    fake.jobs["4"] = [FakeJob("RUNNING", "0", nodes="c1")]
    said: list[str] = []
    (view,) = cancel([run], How(limit_s=0.05), said.append, slurm=fake.slurm(), poll_s=0.01)
    assert view.state.state == "CANCELLED"
    assert any("has not stopped within 0.05 s" in line for line in said)


def test_now_does_not_wait(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, state="RUNNING", job_id="4_0")
    fake.jobs["4"] = [FakeJob("RUNNING", "0", nodes="c1")]
    (view,) = cancel([run], How(now=True), lambda _: None, slurm=fake.slurm(), poll_s=0.01)
    assert view.state.state == "CANCELLED"
    assert not run.stop_file.exists()


def test_over_already(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, state="COMPLETED", job_id="4_0")
    said: list[str] = []
    cancel([run], How(), said.append, slurm=fake.slurm())
    assert said == [f"{run.path.name} is over already: COMPLETED"]
    assert fake.calls == []


def test_the_controller_is_away(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, state="RUNNING", job_id="4_0")
    fake.away = True
    said: list[str] = []
    with pytest.raises(SchedulerError, match="The wish to cancel is kept") as caught:
        cancel([run], How(), said.append, slurm=fake.slurm())
    assert caught.value.exit_code == 3
    assert "the wish is kept" in said[0]
    assert run.stop_file.read_text().split()[0] == "cancel", "workers look here"
    assert run.read_state().state == "RUNNING"


@pytest.mark.parametrize("now", [False, True])
def test_slurm_is_told_when_it_answers_again(
    now: bool, runs_dir: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(patience.VARIABLE, "20")
    monkeypatch.setattr(patience, "FIRST_S", 0.01)
    run = make_run(runs_dir, state="RUNNING", job_id="4_0")
    waits = make_run(runs_dir, "bbbb", job_id="4_1", array_index=1)
    fake.jobs["4"] = [FakeJob("RUNNING", "0", nodes="c1"), FakeJob("PENDING", "1")]
    fake.away = True
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        fake.away = sum("next try in" in line for line in said) < 3

    views = cancel([run, waits], How(now=now, limit_s=0.05), say, slurm=fake.slurm(), poll_s=0.01)
    assert [view.state.state for view in views] == ["CANCELLED", "CANCELLED"]
    assert sum("the wish is kept" in line for line in said) == 2


def test_slurm_goes_away_between_two_commands(
    runs_dir: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(runs_dir, job_id="4_0")
    fake.jobs["4"] = [FakeJob("PENDING", "0")]
    scancel = fake._scancel

    def gone(command: list[str], text: str) -> subprocess.CompletedProcess[str]:
        fake.away = True
        return fake.run(command, text, 1.0)

    monkeypatch.setattr(fake, "_scancel", gone)
    with pytest.raises(SchedulerError, match=r"Unable to contact(.|\n)*The wish to cancel is kept"):
        cancel([run], How(), lambda _: None, slurm=fake.slurm())
    monkeypatch.setattr(fake, "_scancel", scancel)
    fake.away = False
    assert look(run, fake.slurm()).state.state == "PENDING"
    assert look(run, fake.slurm()).state.state == "CANCELLED", "the look before has told Slurm"


def test_a_run_that_has_no_job_id_yet(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, created=now())
    said: list[str] = []
    (view,) = cancel([run], How(), said.append, slurm=fake.slurm(), poll_s=0.01)
    assert "is being submitted" in said[0]
    assert view.state.state == "PENDING"


def test_local(runs_dir: Path) -> None:
    run = make_run(runs_dir, kind="local", submission=None, created=now())
    command = [sys.executable, "-m", "tests.runs.fake_agent", str(run.path), "100000", "0.02"]
    agent = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while run.step() == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        (view,) = cancel([run], How(limit_s=30), lambda _: None, poll_s=0.05)
        assert (view.state.state, view.state.exit_code) == ("CANCELLED", 130)
        assert agent.wait(timeout=30) == 0
    finally:
        agent.kill()
        agent.wait()
