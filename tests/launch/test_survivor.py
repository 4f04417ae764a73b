"""When another node's agent speaks for a first node that is gone: see test_steps.py for the whole of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcdl.launch import survivor
from hpcdl.launch.place import Place, find
from hpcdl.runs.store import RunDir
from hpcdl.spec import ClusterSpec
from tests.fake_slurm import FakeSlurm
from tests.launch.making import ANSWERS, SILENT, TOKEN, make_runs

JOB = {
    "SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0", "SLURM_NODEID": "1",
    "SLURMD_NODENAME": "n2", "HPCDL_NODES": "n1 n2", "HPCDL_HEAD": "127.0.0.1", "HPCDL_PORT": "20123",
}  # fmt: skip


def never() -> bool:
    return False


@pytest.fixture
def second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunDir, Place]:
    """The second node of a job whose try 0.0 trains."""
    monkeypatch.setattr(survivor, "TURN_S", 0.2)
    monkeypatch.setattr(survivor, "RESTART_S", 0.6)
    cluster = ClusterSpec(kind="slurm", nodes=2)
    (run,) = make_runs(tmp_path / "runs", cluster, state="RUNNING", running_try="0.0", job_id="12_0")
    return run, find(tmp_path / "runs" / ".submissions" / TOKEN / "runs.txt", None, JOB)


@pytest.mark.parametrize(("first", "speaks"), [(SILENT, True), (ANSWERS, False)])
def test_it_speaks_only_where_the_first_node_does_not_answer(
    second: tuple[RunDir, Place], cluster: FakeSlurm, first: str, speaks: bool
) -> None:
    """One that answers has lost its agent only: its supervisor speaks."""
    cluster.set(addresses={"n1": first})
    assert survivor.must_speak(*second, "0.0", never) is speaks


@pytest.mark.parametrize("changes", [{"running_try": "0.0.1"}, {"state": "PENDING"}, {"submission": "other"}])
def test_it_is_silent_where_somebody_has_spoken(
    second: tuple[RunDir, Place], cluster: FakeSlurm, changes: dict[str, str]
) -> None:
    run, place = second
    cluster.set(addresses={"n1": SILENT})
    run.update(**changes)
    assert not survivor.must_speak(run, place, "0.0", never)


def test_a_first_node_that_could_not_start_the_run_anew_is_waited_for_no_longer(
    second: tuple[RunDir, Place], cluster: FakeSlurm
) -> None:
    """Cut off, it took the others for lost, and reaches Slurm no more than they reach it."""
    run, place = second
    cluster.set(addresses={"n1": SILENT})
    run.update(reason="restarts in place after: NodeLost")
    assert survivor.must_speak(run, place, "0.0", never)


def test_it_waits_no_longer_where_slurm_ends_its_step(
    second: tuple[RunDir, Place], cluster: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survivor, "TURN_S", 600.0)
    cluster.set(addresses={"n1": SILENT})
    assert survivor.must_speak(*second, "0.0", lambda: True)


def test_the_old_job_is_ended_only_once_another_one_carries_the_run(
    second: tuple[RunDir, Place], cluster: FakeSlurm
) -> None:
    run, place = second
    survivor.let_the_job_end(run, place)
    assert not cluster.calls("scancel")
    run.update(job_id="13_0")
    survivor.let_the_job_end(run, place)
    assert [call["argv"] for call in cluster.calls("scancel")] == [["12_0"]]
