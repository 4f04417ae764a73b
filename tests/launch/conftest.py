from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_slurm import FakeSlurm
from tests.launch.making import Agents


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
