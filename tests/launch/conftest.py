from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_slurm import FakeSlurm
from tests.launch.making import ANSWERS, SILENT, Agents, job_show


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    made = Agents(runs_dir=tmp_path / "runs")
    yield made
    made.close()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    fake.set()
    for key, value in fake.environment.items():
        monkeypatch.setenv(key, value)
    return fake


@pytest.fixture
def cluster(slurm: FakeSlurm) -> Iterator[FakeSlurm]:
    """Nodes n1 to n4, of which all answer but n4: a slurmd listens on one of two loopback addresses."""
    with socket.create_server((ANSWERS, 0)) as slurmd:
        (slurm.folder / "tasks").mkdir()
        (slurm.folder / "tasks" / "12_0.json").write_text(
            '{"state": "RUNNING", "restarts": 0, "reason": "None", "comment": ""}'
        )
        addresses = {"n1": ANSWERS, "n2": ANSWERS, "n3": ANSWERS, "n4": SILENT}
        slurm.set(port=slurmd.getsockname()[1], addresses=addresses, job_show=job_show())
        yield slurm
