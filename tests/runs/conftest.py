from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs.making import FakeSlurm


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture
def fake() -> FakeSlurm:
    return FakeSlurm()
