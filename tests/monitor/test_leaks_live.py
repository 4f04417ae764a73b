"""Leaks of real processes, found by the real chain: samples, question, tracing, event."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcdl.monitor import leaks
from hpcdl.runs import feed
from hpcdl.spec import ClusterSpec
from hpcdl.spec.plain import dump_yaml, to_plain
from tests.factory import tiny_spec
from tests.launch.making import TOKEN, make_runs

HERE = Path(__file__).parent
BENCHMARK = HERE.parents[1] / "benchmarks" / "leaks.py"


@pytest.mark.slow
@pytest.mark.torch
def test_a_run_that_leaks_names_the_line(tmp_path: Path) -> None:
    """Agent, torchrun and worker are real; the sampler's own limits hold."""
    run = make_runs(tmp_path, ClusterSpec(kind="local", max_restarts=0))[0]
    spec = tiny_spec(
        trainer__max_steps=600, monitor__name="default", monitor__every_s=0.1, trainer__global_batch_size=2
    )
    run.spec_file.write_text(dump_yaml(to_plain(spec)))
    agent = subprocess.run(
        [sys.executable, str(HERE / "leaky_agent.py"), str(tmp_path / ".submissions" / TOKEN / "runs.txt")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=900,
        check=False,
    )
    assert agent.returncode == 0, run.read_state().reason
    (event,) = [event for event in run.events() if event["event"] == "leak"]
    assert event["process"]["role"] == "rank" and event["process"]["rank"] == 0 and event["memory"] == "host"
    assert event["bytes_per_step"] == pytest.approx(100_000, rel=0.1)
    assert event["interval"][0] <= event["bytes_per_step"] <= event["interval"][1]
    assert 24 <= event["step"] < 600 and event["steps_until_full"] > 0 and event["full_at"] > event["time"]
    line = _leak_line(HERE / "leaky_worker.py")
    assert event["growing"][0]["where"].endswith(f"leaky_worker.py:{line}")
    assert event["growing"][0]["bytes_per_step"] == pytest.approx(100_000, rel=0.1)
    assert event["message"] in feed.Feed(run).read()
    assert "warning: rank 0" in "".join(file.read_text() for file in run.logs.iterdir())
    worst = leaks.of_run(run)[0]
    assert worst.growth.leak and worst.who.role == "rank"


def _leak_line(file: Path) -> int:
    lines = file.read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if "# LEAK" in line)
