"""Which rank the others wait for, in real runs one rank of which is held up; and the parts of a look."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hpcdl.monitor import stragglers
from hpcdl.runs.store import RunDir
from hpcdl.worker import waiting
from tests.worker.conftest import Workers, until
from tests.worker.test_communication import kernel

pytestmark = pytest.mark.torch


def make(workers: Workers, **dotted: Any) -> RunDir:
    return workers.make(**{"monitor__name": "default", "monitor__every_s": 0.01, **dotted})


def told(run: RunDir) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"].startswith("straggler")]


SLOW = pytest.mark.slow
HELD_UP = [
    ("ddp", 2, "1:forward:0.04", "computing"),
    pytest.param("fsdp", 3, "2:data:0.2", "loading data", marks=SLOW),
    pytest.param("tp", 2, "1:forward:0.04", "computing", marks=SLOW),
    ("pp", 2, "0:forward:0.04", "computing"),
    pytest.param("cp", 2, "1:data:0.2", "loading data", marks=SLOW),
    pytest.param("local_sgd", 2, "1:forward:0.04", "computing", marks=SLOW),
    pytest.param("hogwild", 2, "0:forward:0.04", "computing", marks=SLOW),
    pytest.param("param_server", 2, "1:forward:0.04", "computing", marks=SLOW),
]


@pytest.mark.parametrize(("strategy", "count", "slow", "cause"), HELD_UP)
def test_the_rank_that_is_held_up_is_named(
    workers: Workers, strategy: str, count: int, slow: str, cause: str
) -> None:
    batch = {"trainer__global_batch_size": 6, "trainer__micro_batch_size": 2} if count == 3 else {}
    run = make(workers, parallel__name=strategy, trainer__max_steps=5000, **batch)
    workers.start(run, count, module="tests.worker.slowed", env={"SLOW": slow})
    try:
        until(lambda: bool(told(run)), "a word of who is slow", 200)
    finally:
        run.stop_file.write_text("cancel\n")
        finished = workers.finish(run)
    first = told(run)[0]
    rank = int(slow.partition(":")[0])
    assert (first["event"], first["rank"], first["cause"]) == ("straggler", rank, cause)
    assert first["slower_by"] > 1.3
    assert "straggler at step" in finished.log
    assert len(stragglers.of_run(run)) == count


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tp", "pp", "local_sgd"])
def test_nobody_is_named_for_what_it_does_where_all_are_well(workers: Workers, strategy: str) -> None:
    """A busy machine may really take the CPU from one of them."""
    run = make(workers, parallel__name=strategy, trainer__max_steps=150)
    workers.go(run, 2, module="tests.worker.slowed")
    assert [event for event in told(run) if event["cause"] != "its node"] == []
    assert len(stragglers.of_run(run)) == 2


@pytest.mark.slow
def test_a_process_that_is_stopped_again_and_again(workers: Workers) -> None:
    """As cpulimit does, or a freezer."""
    run = make(workers, trainer__max_steps=5000)
    pids = workers.start(run, 2, module="tests.worker.slowed")
    over = threading.Event()

    def hold_up() -> None:
        while not over.wait(0.05):
            os.kill(pids[1], signal.SIGSTOP)
            time.sleep(0.15)
            os.kill(pids[1], signal.SIGCONT)

    until(lambda: (run.path / "ranks.jsonl").exists(), "the first look")
    holding = threading.Thread(target=hold_up)
    holding.start()
    try:
        until(lambda: bool(told(run)), "a word of who is slow", 200)
    finally:
        over.set()
        holding.join()
        run.stop_file.write_text("cancel\n")
        workers.finish(run)
    assert (told(run)[0]["rank"], told(run)[0]["cause"]) == (1, "its node")


def test_one_process_has_nobody_to_wait_for(workers: Workers) -> None:
    run = make(workers, trainer__max_steps=4)
    workers.go(run)
    assert not (run.path / "ranks.jsonl").exists()


# --- parts -----------------------------------------------------------------------------------------------------


def test_what_of_spans_others_do_not_cover() -> None:
    assert waiting.less([(0, 10), (20, 30), (40, 50)], [(2, 4), (9, 22), (29, 45), (60, 70)]) == [
        (0, 2),
        (4, 9),
        (22, 29),
        (45, 50),
    ]
    assert waiting.less([(0, 4)], []) == [(0, 4)]
    assert waiting.less([(5, 6)], [(0, 10)]) == []


def test_on_a_gpu_what_no_kernel_hides_is_waited() -> None:
    events = [
        kernel("gemm", 0, 50),
        kernel("ncclDevKernel_AllReduce", 40, 90),
        kernel("gemm", 60, 70),
        kernel("nccl:all_reduce", 0, 100, annotation=True),
        kernel("aten::mm", 0, 100, gpu=False),
    ]
    assert waiting.exposed(events) == [(50, 60), (70, 90)]


def test_on_a_cpu_collectives_and_numbers_under_way_are() -> None:
    events = [
        SimpleNamespace(name=lambda name=name: name, start_ns=lambda: 1, end_ns=lambda: 2)
        for name in ("gloo:all_reduce", "Optimizer.step", "hpcdl.comm:rpc:12", "hpcdl.wait")
    ]
    assert waiting.under_way(events) == [(1, 2)] * 3


def test_a_look_at_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleeping is no waiting for others, and computing is running."""
    meter = waiting._Meter(torch.device("cpu"))
    for _ in range(2):
        meter.begin()
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass
        time.sleep(0.03)
        meter.end()
    step_s, wait_s, data_s, cpu_s, delay_s, still_s, cost_s = meter.numbers()
    assert step_s >= 0.05
    assert (wait_s, data_s) == (0.0, 0.0)
    assert 0.02 <= cpu_s < step_s - 0.029
    assert 0 <= delay_s < step_s
    assert 0 <= still_s <= step_s
    assert cost_s > 0


def test_a_profiler_that_refuses_ends_no_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: object) -> None:
        raise RuntimeError("Can't enable Kineto profiling\nmore")

    monkeypatch.setattr(waiting._Meter, "_start", refuse)
    meter = waiting._Meter(torch.device("cpu"))
    meter.begin()
    meter.end()
    step_s, wait_s, *_ = meter.numbers()
    assert step_s > 0
    assert math.isnan(wait_s)
    assert "Can't enable Kineto profiling\n" in capsys.readouterr().out


STOPPED = """
import os, sys, time
from hpcdl.worker.waiting import _Ticker
ticker, began = _Ticker(), time.time_ns()
print("ready", flush=True)
sys.stdin.readline()
print(ticker.stop([(began, time.time_ns())]))
"""


def test_a_stop_from_outside_is_noticed() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    until(lambda: Path(f"/proc/{process.pid}/stat").read_text().split(") ")[1][0] == "T", "it stands still")
    time.sleep(0.3)
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate("\n", timeout=60)
    assert 0.25 < float(said) < 10
