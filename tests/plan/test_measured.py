"""Plans against bytes of tensors that real trainings had (benchmarks/planner.py, torch 2.13): arithmetic only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcdl.plan import memory
from hpcdl.plan.records import of_rank
from tests.factory import tiny_spec

POINTS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "measured.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point['name']} {point['tensors'][0]}")
def test_a_step_was_planned_as_it_was_measured(point: dict[str, Any]) -> None:
    stages = memory.ranks(tiny_spec(**point["settings"]), "cpu", point["ranks"])
    assert stages is not None
    for rank, measured in enumerate(point["tensors"]):
        assert of_rank(stages, rank).tensors == pytest.approx(measured, rel=0.03)
