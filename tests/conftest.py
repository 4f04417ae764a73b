"""Shared by all tests: no test sees the user's own runs, cache of run ids, or Slurm job."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a fresh login: no $HPCDL_RUNS, not inside a Slurm job. The cache stays, made once, and the wish to
    write golden files anew."""
    for key in [k for k in os.environ if k.startswith(("SLURM_", "SBATCH_", "HPCDL_"))]:
        if key not in ("HPCDL_CACHE", "HPCDL_GOLDEN"):
            monkeypatch.delenv(key)
