from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcdl.errors import SchedulerError
from hpcdl.launch.base import JobRequest
from hpcdl.launch.local import BACKEND
from hpcdl.runs.store import RunDir
from hpcdl.spec import ClusterSpec
from tests.launch.making import FAKE_TORCH, HERE, TOKEN, alive, golden, make_runs, request, until


def job(runs_dir: Path, runs: list[RunDir], **fields: object) -> tuple[JobRequest, str]:
    """A local submission of these runs, and its text with the tests' own agent."""
    made = JobRequest(
        token=TOKEN,
        name="lora",
        cluster=ClusterSpec(kind="local", **fields),  # type: ignore[arg-type]
        runs_dir=runs_dir,
        run_dirs=tuple(run.path for run in runs),
        python=sys.executable,
    )
    text = BACKEND.render(made)
    assert "-m hpcdl.launch.job " in text
    return made, text.replace("-m hpcdl.launch.job", str(HERE / "agent.py"))


def ended(runs: list[RunDir]) -> bool:
    return all(run.read_state().ended for run in runs)


@pytest.fixture(autouse=True)
def fake_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAKE_TORCH))


LOCAL = {"kind": "local", "python": "/usr/bin/python3"}
SCRIPTS = {
    "local-single.sh": request(**LOCAL, processes_per_node=2),
    "local-sweep.sh": request(
        3, **LOCAL, runs_dir=Path("/home/me/my runs"), setup=("source env/bin/activate",)
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_whole_scripts(name: str) -> None:
    golden(name, BACKEND.render(SCRIPTS[name]))


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_can_read_them(name: str) -> None:
    text = BACKEND.render(SCRIPTS[name])
    assert subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True).stderr == ""


def test_submit_returns_at_once_and_the_run_goes_on(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, ClusterSpec(kind="local", env={"MODE": "wait"}))
    request, text = job(tmp_path, runs)
    assert BACKEND.submit(request, text) is None
    assert (request.folder / "job.sh").read_text() == text
    until(lambda: (runs[0].path / "pid-0").exists(), "the worker has started")
    until(lambda: runs[0].read_state().agent_pid, "the agent has said which process it is")
    state = runs[0].read_state()
    record = json.loads((request.folder / "runner.json").read_text())
    assert Path(f"/proc/{record['pid']}/task/{record['pid']}/children").read_text().split() == [
        str(state.agent_pid)
    ]
    assert record["host"] == os.uname().nodename
    assert record["started"] == pytest.approx(state.agent_started, abs=5)
    assert os.getsid(record["pid"]) == record["pid"]
    runs[0].stop_file.write_text("cancel")
    until(lambda: ended(runs), "the run has ended")
    until(lambda: not alive(record["pid"]), "the agent has gone, and is no zombie")


def test_runs_of_a_sweep_have_their_turn_one_after_the_other(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, ClusterSpec(kind="local", env={"MODE": "finish"}), count=3)
    spec = runs[1].spec_file
    spec.write_text(spec.read_text().replace("finish", "silent"))  # a failure in the middle
    request, text = job(tmp_path, runs)
    BACKEND.submit(request, text)
    until(lambda: ended(runs), "all have ended", 60)
    states = [run.read_state() for run in runs]
    assert [s.state for s in states] == ["COMPLETED", "FAILED", "COMPLETED"]
    for before, after in itertools.pairwise(states):
        assert before.ended is not None and after.started is not None
        assert before.ended <= after.started


def test_an_interrupted_run_ends_the_sweep(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, ClusterSpec(kind="local", env={"MODE": "wait"}), count=2)
    request, text = job(tmp_path, runs)
    BACKEND.submit(request, text)
    until(lambda: (runs[0].path / "pid-0").exists(), "the worker has started")
    runs[0].stop_file.write_text("cancel")
    pid = json.loads((request.folder / "runner.json").read_text())["pid"]
    until(lambda: not alive(pid), "the shell has ended")
    assert [run.read_state().state for run in runs] == ["CANCELLED", "PENDING"]


def test_setup_lines_come_first_and_their_failure_is_written_down(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, ClusterSpec(kind="local", env={"MODE": "finish"}))
    request, text = job(tmp_path, runs, setup=("echo no such module >&2", "false"))
    BACKEND.submit(request, text)
    pid = json.loads((request.folder / "runner.json").read_text())["pid"]
    until(lambda: not alive(pid), "the shell has ended")
    assert runs[0].read_state().state == "PENDING"
    assert "no such module" in (request.folder / "local.out").read_text()


def test_without_bash_nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = make_runs(tmp_path, ClusterSpec(kind="local"))
    request, text = job(tmp_path, runs)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SchedulerError, match="bash could not be started"):
        BACKEND.submit(request, text)
