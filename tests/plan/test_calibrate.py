"""Constants fitted to finished runs: found again where they are known, safe where they aren't, kept in a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hpcdl.launch import calibrating
from hpcdl.plan import calibrate, devices, make, memory
from hpcdl.plan.calibrate import Held, Timed
from hpcdl.plan.records import RankMemory
from hpcdl.runs import memory as report
from hpcdl.runs.files import append_line, write_json
from hpcdl.runs.store import RunDir
from hpcdl.spec.plain import dump_yaml, to_plain
from tests.factory import tiny_spec

MIB = 2**20


def planned(tensors: int, allocator: int = 0, runtime: int = 500 * MIB) -> RankMemory:
    return RankMemory(
        stage=0, ranks=1, bytes={}, at_peak={}, tensors=tensors, moment="backward", allocator=allocator,
        runtime=runtime,
    )  # fmt: skip


def held(beside: int, factor: float, sizes: Sequence[int]) -> list[Held]:
    """Runs whose process really takes so much beside tensors, and so many times what is planned for the allocator."""
    found = []
    for number, size in enumerate(sizes):
        plan = planned(size, allocator=size // 10)
        peak = plan.tensors + plan.runtime + beside + round(factor * plan.allocator)
        found.append(Held(run=str(number), kind="cpu", plan=plan, peak=peak))
    return found


SIZES = [MIB * size for size in (100, 230, 400, 900, 1500, 3000)]


@pytest.mark.parametrize(("beside", "factor"), [(-90 * MIB, 0.5), (0, 1.0), (260 * MIB, 2.5)])
def test_constants_are_found_again(beside: int, factor: float) -> None:
    found = calibrate.fit_memory(held(beside, factor, SIZES))["cpu"]
    assert found.allocator == pytest.approx(factor, rel=0.01) and found.runs == len(SIZES)
    assert found.beside == pytest.approx(beside, abs=MIB)
    assert found.error_after < 0.002 and (found.error_before > 0.02 or factor == 1)


@pytest.mark.parametrize("above", [200 * MIB, 2000 * MIB])
def test_no_measured_run_is_planned_too_small(above: int) -> None:
    """One run is far above what all others say: the median doesn't follow it, safety does."""
    runs = held(-90 * MIB, 0.5, SIZES)
    runs.append(dataclasses.replace(runs[2], run="odd", peak=runs[2].peak + above))
    found = calibrate.fit_memory(runs)["cpu"]
    assert all(calibrate.moved(run.plan, found).peak >= run.peak for run in runs)


def test_few_runs_make_no_plan_smaller() -> None:
    few = held(-90 * MIB, 0.5, SIZES[: calibrate.ENOUGH - 1])
    assert calibrate.fit_memory(few)["cpu"].beside == 0 and calibrate.fit_memory(few)["cpu"].allocator == 1
    one = held(70 * MIB, 1.0, SIZES[:1])
    assert calibrate.fit_memory(one)["cpu"].beside == 70 * MIB
    # the ranks of one run are one witness
    same = [dataclasses.replace(rank, run="one") for rank in held(-90 * MIB, 0.5, SIZES)]
    assert calibrate.fit_memory(same)["cpu"].beside == 0


def work(flops: float, bandwidth: float, operations: float) -> Any:
    """A run's seconds by the factors that count for it."""

    def seconds(factors: devices.Calibration) -> float:
        return flops / factors.flops + bandwidth / factors.bandwidth + operations * factors.operation

    return seconds


def test_rates_are_found_again_and_a_disturbed_run_changes_little() -> None:
    true = devices.Calibration(flops=0.5, operation=2.0)
    predictions = [work(a, b, c) for a in (1.0, 4.0, 20.0) for b in (0.1, 2.0) for c in (0.05, 1.0, 6.0)]
    runs = [Timed(device="cpu", step_s=each(true), predict=each) for each in predictions]
    runs[3] = dataclasses.replace(runs[3], step_s=30 * runs[3].step_s)
    found = calibrate.fit_rates(runs)["cpu"]
    assert found.factors.flops == pytest.approx(0.5, rel=0.15)
    assert found.factors.operation == pytest.approx(2.0, rel=0.15)
    assert found.factors.between == 1  # nobody has said anything of it
    assert found.error_after < 0.1 < found.error_before


def finished(folder: Path, number: int, *, peak: int, step_s: float, ended: bool = True) -> RunDir:
    """A run directory as a worker leaves it."""
    spec = tiny_spec(trainer__micro_batch_size=number + 1, trainer__global_batch_size=8 * (number + 1))
    run = RunDir(folder / "tiny" / f"{number:012x}")
    run.path.mkdir(parents=True)
    run.spec_file.write_text(dump_yaml(to_plain(spec)))
    record: dict[str, Any] = {
        "device": "cpu", "rank": 0, "world_size": 1, "measured": {"tensors": 1, "peak": peak - 5 * MIB},
        **({"ended": {"peak": peak}} if ended else {}),
    }  # fmt: skip
    write_json(report.file_of(run.path, 0), record)
    for step in range(6):
        append_line(run.metrics_file, {"step": step + 1, "loss": 1.0, "step_s": step_s})
    state = {
        "run_id": f"{number:012x}", "name": "tiny", "state": "COMPLETED", "kind": "local", "nodes": 1,
        "world_size": 1, "max_steps": 6, "created": f"2026-01-0{number + 1}T00:00:00+00:00",
    }  # fmt: skip
    write_json(run.state_file, state)
    return run


def test_a_folder_of_runs_is_fitted_kept_and_planned_by(tmp_path: Path) -> None:
    spec = tiny_spec()
    ours = memory.ranks(spec, "cpu", 1)
    assert ours is not None
    for number in range(calibrate.ENOUGH):
        finished(tmp_path, number, peak=900 * MIB + number, step_s=1.0)
    (tmp_path / "tiny" / f"{2:012x}" / "memory.json").write_text("{ half of")  # a run that lost its record
    found = calibrating.calibrate(tmp_path)
    words = "\n".join(calibrating.in_words(found, tmp_path))
    assert f"{calibrate.ENOUGH - 1} finished runs" in words and "nothing is planned smaller" in words
    assert calibrating.load(tmp_path) == found
    plain = make.plan(spec)
    plan = make.plan(spec, calibrating.applied(tmp_path, plain.hardware))
    assert plan.peak is not None and plain.peak is not None
    assert plan.peak.peak > 890 * MIB and plan.peak.tensors == plain.peak.tensors
    assert "finished runs" in plan.hardware.sources["beside tensors"]


@pytest.mark.parametrize("text", ["", "[1]", '{"memory": {"cpu": {"nonsense": 1}}, "rates": {}, "time": ""}'])
def test_a_broken_file_is_no_calibration(tmp_path: Path, text: str) -> None:
    (tmp_path / calibrating.FILE).write_text(text)
    assert calibrating.load(tmp_path) is None
    hardware = make.plan(tiny_spec()).hardware
    assert calibrating.applied(tmp_path, hardware) == hardware


def test_where_nothing_was_measured_nothing_is_kept(tmp_path: Path) -> None:
    found = calibrating.calibrate(tmp_path)
    assert "no finished run" in calibrating.in_words(found, tmp_path)[0]
    assert not (tmp_path / calibrating.FILE).exists()
    json.dumps(dataclasses.asdict(found))
