"""Shared by all tests: no test sees the user's own runs, cache of run ids, or Slurm job."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.slurm.fixtures import cluster, slurm

__all__ = ["cluster", "slurm"]

SLOW = os.environ.get("HPCDL_SLOW") == "1"
HERE = Path(__file__).parent
ON_THE_CLUSTER = (HERE / "slurm", HERE / "chaos")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what needs the cluster; leaves slow tests to `make test-all`: deselected, as the last line counts."""
    for item in items:
        if any(folder in Path(item.fspath).parents for folder in ON_THE_CLUSTER):
            item.add_marker(pytest.mark.slurm)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(900))
    slow = [] if SLOW else [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a fresh login: no $HPCDL_RUNS, not inside a Slurm job. The cache stays, made once, and the wish to
    write golden files anew."""
    for key in [k for k in os.environ if k.startswith(("SLURM_", "SBATCH_", "HPCDL_"))]:
        if key not in ("HPCDL_CACHE", "HPCDL_GOLDEN"):
            monkeypatch.delenv(key)
    monkeypatch.setenv("HPCDL_SLURM_PATIENCE_S", "0")  # a Slurm that is away is asked once
