from __future__ import annotations

from tests.runs.conftest import fake, runs_dir

__all__ = ["fake", "runs_dir"]
