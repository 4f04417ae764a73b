"""Which runs are followed, in which order, and the exit code of the whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from hpcdl.launch import local, running
from hpcdl.launch.__main__ import main
from hpcdl.launch.base import JobRequest
from hpcdl.runs import follow
from hpcdl.runs.state import RunState
from hpcdl.runs.store import RunDir
from tests.fake_slurm import FakeSlurm

ENDS = {
    "done": {"state": "COMPLETED", "exit_code": 0},
    "failed": {"state": "FAILED", "exit_code": 1},
    "interrupted": {"state": "CANCELLED", "exit_code": 130},
}


@dataclasses.dataclass
class Machine:
    """Stands in for this machine: what was started and followed, and how each run is to end."""

    ends: list[str]
    log: list[tuple[str, tuple[str, ...]]] = dataclasses.field(default_factory=list)

    def submit(self, request: JobRequest, text: str) -> None:
        self.log.append(("started", tuple(path.name for path in request.run_dirs)))

    def follow(self, run: RunDir, **_: Any) -> RunState:
        self.log.append(("followed", (run.path.name,)))
        return run.update(**ENDS[self.ends.pop(0)])

    def follow_all(self, runs: list[RunDir], **_: Any) -> list[RunState]:
        self.log.append(("followed", tuple(run.path.name for run in runs)))
        return [run.update(**ENDS[self.ends.pop(0)]) for run in runs]

    def verbs(self) -> list[str]:
        return [verb for verb, _ in self.log]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(ends=[])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "NEEDED", ())
    monkeypatch.setattr(local, "BACKEND", made)
    monkeypatch.setattr(local.LocalBackend, "submit", lambda _, *rest: made.submit(*rest))
    made.render = local.LocalBackend().render  # type: ignore[attr-defined]
    monkeypatch.setattr(follow, "follow", made.follow)
    monkeypatch.setattr(follow, "follow_all", made.follow_all)
    return made


@pytest.mark.parametrize(("end", "code"), [("done", 0), ("failed", 1), ("interrupted", 130)])
def test_a_local_run_gives_its_exit_code(machine: Machine, end: str, code: int) -> None:
    machine.ends = [end]
    assert main(["+experiment=pretrain_tiny"]) == code
    assert machine.verbs() == ["started", "followed"]


def test_a_failed_point_does_not_keep_the_next_from_its_turn(machine: Machine) -> None:
    machine.ends = ["failed", "done", "done"]
    assert main(["-m", "+experiment=pretrain_tiny", "seed=1,2,3"]) == 1
    assert machine.verbs() == ["started", *["followed"] * 3]


def test_an_interrupt_ends_the_sweep(machine: Machine) -> None:
    machine.ends = ["interrupted"]
    assert main(["-m", "+experiment=pretrain_tiny", "seed=1,2,3"]) == 130
    assert machine.verbs() == ["started", "followed"]


def test_shapes_on_this_machine_run_one_after_the_other(machine: Machine) -> None:
    machine.ends = ["done", "done"]
    assert main(["-m", "+experiment=pretrain_tiny", "cluster.processes_per_node=1,2"]) == 0
    assert machine.verbs() == ["started", "followed", "started", "followed"]


def test_parsable_prints_the_line_and_nothing_else(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.ends = ["done"]
    assert main(["+experiment=pretrain_tiny", "parsable=true"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    run_id, job_id, run_dir = line.split("\t")
    assert job_id == "-" and Path(run_dir).name == run_id


@pytest.mark.parametrize(("ends", "code"), [(["done", "done"], 0), (["done", "failed"], 1)])
def test_waiting_for_jobs(machine: Machine, slurm: FakeSlurm, ends: list[str], code: int) -> None:
    machine.ends = list(ends)
    assert main(["-m", "+experiment=pretrain_tiny", "cluster=slurm", "seed=1,2", "wait=true"]) == code
    assert [len(runs) for _, runs in machine.log] == [2]


def test_without_wait_it_returns_at_once(machine: Machine, slurm: FakeSlurm) -> None:
    assert main(["+experiment=pretrain_tiny", "cluster=slurm"]) == 0
    assert not machine.log


def test_here_and_there_in_one_sweep(machine: Machine, slurm: FakeSlurm) -> None:
    machine.ends = ["done"]
    assert main(["-m", "+experiment=pretrain_tiny", "cluster=local,slurm"]) == 0
    assert machine.verbs() == ["started", "followed"]
    assert len(slurm.calls("sbatch")) == 1
