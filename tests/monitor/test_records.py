"""The lines of system-<node>.jsonl: written short, read whatever is in them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from hpcdl.monitor import records
from hpcdl.monitor.records import GpuSample, NodeSample, ProcessSample
from hpcdl.runs.store import RunDir

RANK = ProcessSample(
    pid=11, role="rank", rank=3, step=7, phase="step", rss_bytes=1 << 30, cpu_percent=99.5, threads=9,
    open_files=40, read_bytes=0, written_bytes=4096, gpu_memory_bytes=1 << 31,
)  # fmt: skip
FULL = NodeSample(
    time="2026-01-31T12:00:00.000+00:00",
    next_s=5.0,
    node="n1",
    attempt="0.1",
    cpu_percent=101.5,
    rss_bytes=3 << 30,
    node_cpu_percent=50.0,
    memory_available_bytes=1 << 34,
    memory_limit_bytes=1 << 35,
    net_sent_bytes=0,
    processes=(RANK, ProcessSample(pid=12, role="loader", rank=3, rss_bytes=5), ProcessSample(pid=13)),
    gpus=(
        GpuSample(index=0, name="H100", memory_used_bytes=5, power_w=0.0, throttled=("power cap", "too hot")),
        GpuSample(index=1, mig=0, xid=79),
    ),
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def write(run: RunDir, *lines: object, node: str = "n1") -> None:
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    records.file_of(run, node).write_text(text)


def test_what_is_written_is_read(run: RunDir) -> None:
    for sample in (FULL, NodeSample(time="t", node="n1")):
        assert records.of_line(json.loads(json.dumps(records.as_line(sample)))) == sample
    write(run, records.as_line(FULL))
    assert list(records.read(run, "n1")) == [FULL] and records.last(run, "n1") == FULL
    assert records.nodes(run) == ["n1"]
    assert [rank.pid for rank in FULL.ranks] == [11]


def test_nothing_is_no_zero(run: RunDir) -> None:
    line = records.as_line(FULL)
    assert line["net_sent_bytes"] == 0 and "net_received_bytes" not in line
    assert line["processes"]["read_bytes"] == [0], "nulls at a column's end are left out"
    assert line["processes"]["role"] == ["rank", "loader", "other"]
    assert "pss_bytes" not in line["processes"]
    assert line["gpus"]["power_w"] == [0.0] and line["gpus"]["mig"] == [None, 0]


def test_lines_of_old_runs(run: RunDir) -> None:
    """As a thread of local rank 0 wrote them: a count for the processes, lists over the GPUs."""
    old = {
        "time": "t", "cpu_percent": 180.2, "rss_bytes": 5, "processes": 2, "node_cpu_percent": 90.0,
        "memory_available_bytes": 6, "gpu_memory_bytes": [7, 8], "gpu_percent": [9, 10],
    }  # fmt: skip
    write(run, old, node="c1")
    (sample,) = records.read(run, "c1")
    assert (sample.node, sample.rss_bytes, sample.processes) == ("c1", 5, ())
    assert [(gpu.index, gpu.memory_used_bytes, gpu.percent) for gpu in sample.gpus] == [(0, 7, 9), (1, 8, 10)]


def test_a_file_that_somebody_else_wrote_or_that_is_torn(run: RunDir) -> None:
    odd = {
        "time": 5, "rss_bytes": "many", "cpu_percent": float("nan"), "pss_bytes": True, "of_a_later_version": 1,
        "processes": {"pid": [1, None, "x", 4], "rss_bytes": [2, 3, 4, -1.5], "role": [["a"]], "later": [1]},
        "gpus": {"index": [0, 1], "throttled": ["hot", ["power", 3]], "percent": 5},
    }  # fmt: skip
    write(run, odd, [1], "null", "{torn", {"processes": [1], "gpus": "none", "time": "t"})
    first, second = records.read(run, "n1")
    assert first == NodeSample(
        time="",
        node="n1",
        processes=(ProcessSample(pid=1, rss_bytes=2), ProcessSample(pid=4)),
        gpus=(GpuSample(index=0), GpuSample(index=1, throttled=("power", "3"))),
    )
    assert second == NodeSample(time="t", node="n1")
    assert list(records.read(run, "n2")) == [] and records.last(run, "n2") is None


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 25, 100])
def test_a_long_file_is_read_thinly(run: RunDir, count: int) -> None:
    write(run, *({"time": str(number)} for number in range(count)))
    times = [int(sample.time) for sample in records.read(run, "n1", at_most=10)]
    assert len(times) <= 10 and times[-1] == count - 1 and len(times) >= min(count, 6)
    assert len({b - a for a, b in pairwise(times)}) <= 1
