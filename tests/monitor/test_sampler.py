"""Sampling: what a line says, and that it ends nothing and takes little, whatever happens to it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpcdl.monitor import records, sampler
from hpcdl.monitor.allowance import FIRST_BYTES, Allowance
from hpcdl.monitor.gpus import Gpus
from hpcdl.monitor.node import Memory, Node
from hpcdl.monitor.processes import Processes
from hpcdl.monitor.records import NodeSample, ProcessSample
from hpcdl.monitor.sampler import Look, Sampler, Settings
from hpcdl.runs import files
from hpcdl.runs.store import RunDir
from hpcdl.spec import MonitorSpec
from tests.launch.making import until
from tests.monitor.nvml import DATACENTER, Driver

QUICK = Settings(every_s=0.01, pss_every_s=1000.0, bytes_per_day=1e9)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


@pytest.fixture(autouse=True)
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests want their samples at once."""
    monkeypatch.setattr(sampler, "_CPU_SHARE", 1.0)


@contextlib.contextmanager
def sampling(run: RunDir, settings: Settings = QUICK, proc: str = "/proc") -> Iterator[list[NodeSample]]:
    """Of this process, without a torchrun; what was written, once it is over."""
    found: list[NodeSample] = []
    with Sampler(settings, run, "n1", "0.1", Processes(-1, run.path, proc=proc)):
        yield found
    found += records.read(run, "n1")


def warnings(run: RunDir) -> list[str]:
    return [event["message"] for event in run.events()]


def enough(run: RunDir, count: int = 3) -> None:
    until(lambda: len(list(records.read(run, "n1"))) >= count, f"{count} samples")


def test_a_nodes_lines(run: RunDir) -> None:
    with sampling(run, replace(QUICK, pss_every_s=0.001)) as found:
        enough(run)
    processes = found[-1].processes  # this one's, and what earlier tests' libraries may have left below it
    (me,) = (one for one in processes if one.role == "agent")
    assert me.pid == os.getpid() and me.pss_bytes != me.rss_bytes
    assert found[-1].rss_bytes == sum(one.rss_bytes for one in processes)
    assert (found[-1].pss_bytes or 0) == sum(one.pss_bytes or 0 for one in processes)
    assert (found[-1].memory_limit_bytes or 0) > (found[-1].memory_available_bytes or 0) > 0
    assert found[-1].node_cpu_percent is None or 0 <= found[-1].node_cpu_percent <= 100
    assert (found[-1].attempt, found[-1].node) == ("0.1", "n1") and 0 <= (found[-1].next_s or 0) < 5
    assert max(sample.rss_bytes or 0 for sample in found) == found[-1].peak_rss_bytes
    assert warnings(run) == []
    assert "monitor" not in [thread.name for thread in threading.enumerate()]


def test_the_peak_of_earlier_tries_stands(run: RunDir) -> None:
    records.file_of(run, "n1").write_text(json.dumps({"time": "t", "peak_rss_bytes": 1 << 50}) + "\n")
    with sampling(run) as found:
        enough(run)
    assert found[-1].peak_rss_bytes == 1 << 50


def test_none_writes_nothing(run: RunDir) -> None:
    with Sampler(None, run, "n1", "0.0", Processes(-1, run.path)):
        assert "monitor" not in [thread.name for thread in threading.enumerate()]
    assert list(run.path.iterdir()) == []


def test_settings_of_a_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert Settings.of({}) is None and Settings.of({"monitor": {"name": "none", "every_s": 5.0}}) is None
    usual = MonitorSpec()
    old = Settings.of({"monitor": {"name": "default", "every_s": 2}, "cluster": {"gpus_per_node": 4}})
    assert old == Settings(
        every_s=2.0,
        pss_every_s=usual.pss_every_s,
        bytes_per_day=usual.mb_per_day * 1e6,
        wants_gpus=True,
        visible_gpus="2,3",
    )
    full = {"name": "default", "every_s": 1.0, "pss_every_s": 2.0, "mb_per_day": 3.0}
    own = {"monitor": full, "cluster": {"gpus_per_node": 0, "env": {"CUDA_VISIBLE_DEVICES": "1"}}}
    assert Settings.of(own) == Settings(every_s=1.0, pss_every_s=2.0, bytes_per_day=3e6, visible_gpus="1")


def test_on_a_full_disk_few_lines_wait_in_memory(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "_MOST_WAITING", 3)
    append, tried = files.append_bytes, itertools.count()
    full = threading.Event()
    full.set()

    def limited(path: Path, line: bytes) -> None:
        next(tried)
        if full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(path, line)

    monkeypatch.setattr(files, "append_bytes", limited)
    with sampling(run):
        until(lambda: next(tried) > 30, "many attempts")
        assert files.unwritten(records.file_of(run, "n1")) == 3
        full.clear()
        enough(run, 5)
    assert warnings(run) == []


@pytest.mark.parametrize(
    ("where", "words", "error"),
    [
        (
            (sampler, "append_line"),
            "lost: PermissionError: ",
            PermissionError(errno.EACCES, "Permission denied"),
        ),
        ((sampler, "append_line"), "lost: RuntimeError: of any kind", RuntimeError("of any kind")),
        ((Look, "sample"), "missing: ValueError: of any kind", ValueError("of any kind")),
    ],
)
def test_what_goes_wrong_is_told_once(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, where: tuple[object, str], words: str, error: Exception
) -> None:
    tried = itertools.count()

    def fail(*_: object) -> None:
        next(tried)
        raise error

    monkeypatch.setattr(*where, fail)
    with sampling(run):
        until(lambda: next(tried) > 20, "many attempts")
    (told,) = warnings(run)
    assert told.startswith(f"monitor on node n1: a sample is {words}") and str(error) in told


def test_without_proc_the_node_is_still_sampled(run: RunDir) -> None:
    with sampling(run, proc="/nowhere") as found:
        enough(run)
    assert found[-1].processes == () and found[-1].rss_bytes is None and found[-1].memory_limit_bytes
    assert warnings(run) == [
        "monitor on node n1: /proc can't be read, so processes are not sampled: No such file or directory"
    ]


def test_a_user_who_may_start_no_more_threads(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with sampling(run) as found:
        pass
    assert found == [] and warnings(run) == ["monitor on node n1: no samples: can't start new thread"]


def test_a_disk_that_hangs_does_not_hold_up_the_end(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, over = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        hangs.set()
        over.wait(60)

    monkeypatch.setattr(sampler, "append_line", hang)
    monkeypatch.setattr(sampler, "_END_LIMIT_S", 0.05)
    with sampling(run):
        assert hangs.wait(30)
        began = time.monotonic()
    assert time.monotonic() - began < 20
    over.set()


def look(run: RunDir, **more: Any) -> Look:
    settings = Settings(every_s=1.0, pss_every_s=1.0, bytes_per_day=1e9, wants_gpus=True)
    return Look(settings, Processes(-1, run.path), **more)


def test_gpus_in_a_sample(run: RunDir) -> None:
    process = [replace_pid(DATACENTER["nvmlDeviceGetComputeRunningProcesses"][0])]
    driver = Driver({**DATACENTER, "nvmlDeviceGetComputeRunningProcesses": process})
    found = look(run, gpus=Gpus(None, driver))
    sample = found.sample()
    assert [gpu.power_w for gpu in sample.gpus] == [652.3]
    assert sample.processes[0].gpu_memory_bytes == 58 << 30
    assert found.problems == ["GPU 0 is slowed down: too hot (hardware)"], "a power cap is everyday"
    driver.gpus[0]["nvmlDeviceGetTotalEccErrors"] = 2
    driver.events.append((0, 48))
    found.problems.clear()
    assert found.sample().gpus[0].xid == 48
    assert found.problems[:2] == [
        "GPU 0 reports Xid 48 (a memory error that can't be corrected)",
        "GPU 0 has had memory errors that can't be corrected: 2 since its start",
    ]


def replace_pid(process: Any) -> Any:
    return type(process)(pid=os.getpid(), usedGpuMemory=process.usedGpuMemory)


def test_a_driver_that_is_broken_costs_only_its_own_samples(run: RunDir) -> None:
    driver = Driver(DATACENTER)
    found = look(run, gpus=Gpus(None, driver))
    driver.gpus[0]["nvmlDeviceGetMemoryInfo"] = "no structure"
    sample = found.sample()
    assert sample.gpus == () and sample.processes
    assert found.problems == ["no samples of GPUs: AttributeError: 'str' object has no attribute 'used'"]


def test_gpus_that_were_asked_for_and_are_not_seen_are_told(run: RunDir) -> None:
    assert look(run, gpus=Gpus(None, Driver(init=12))).problems == ["no samples of GPUs: error 12"]


def test_memory_that_gets_short_is_worth_a_line(run: RunDir, tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    proc.mkdir()

    def left(percent: float) -> None:
        (proc / "meminfo").write_text(f"MemTotal: 100000 kB\nMemAvailable: {int(1000 * percent)} kB\n")

    found = look(run, node=Node(str(proc), tmp_path / "none"))
    urgent = []
    for percent in (30, 11, 9, 9, 8.8, 8.4, 30):
        left(percent)
        found.sample()
        urgent.append(found.is_urgent())
        if urgent[-1]:
            found.wrote()
    assert urgent == [False, False, True, False, False, True, False]


@pytest.mark.parametrize(
    ("short", "room", "dense"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_memory_that_gets_short_is_written_out_of_turn(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, short: bool, room: bool, dense: bool
) -> None:
    left = itertools.count(90 if short else 900, -1)
    monkeypatch.setattr(Node, "memory", lambda _: Memory(available_bytes=next(left), limit_bytes=1000))
    allowed = Allowance(1.0)
    allowed.spend(FIRST_BYTES * (0.9 if room else 1.0))
    found = look(run)
    one = Sampler(QUICK, run, "n1", "0.0", Processes(-1, run.path))
    for _ in range(25):
        one._sample(found, 5.0, allowed)
    assert found.is_short == short
    # Each 0.5 % of the limit that is gone, besides the first.
    assert len(list(records.read(run, "n1"))) == (5 if dense else 1)


def test_listeners_get_every_sample_and_may_fail(run: RunDir) -> None:
    heard: list[NodeSample] = []

    def fail(_: NodeSample) -> None:
        raise ValueError("of a listener")

    settings = replace(QUICK, bytes_per_day=1.0)
    records.file_of(run, "n1").write_text(
        json.dumps({"time": "2026-01-01T00:00:00+00:00"}) + " " * FIRST_BYTES + "\n"
    )
    with Sampler(settings, run, "n1", "0.0", Processes(-1, run.path), [fail, heard.append]):
        until(lambda: len(heard) > 5, "samples")
    assert len(list(records.read(run, "n1"))) == 2, "few are written down"
    assert heard[-1].processes and (heard[-1].next_s or 0) > 1e6
    assert warnings(run) == ["monitor on node n1: a sample is lost: ValueError: of a listener"]


def test_pss_is_looked_at_rarely_and_the_more_rarely_the_more_it_costs(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0, 0.0]
    monkeypatch.setattr(sampler.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sampler.time, "thread_time", lambda: clock[1])

    def costly(pid: int) -> int:
        clock[1] += 0.01 if pid == os.getpid() else 0.0
        return 5

    monkeypatch.setattr(sampler, "pss_bytes", costly)
    found = look(run)
    known = []
    for second in range(25):
        clock[0] = 1000.0 + second
        if found.sample().pss_bytes is not None:
            known.append(second)
    assert known == [1, 11, 21]
    assert found.pss_s == 0.0


def test_very_many_processes_are_counted_and_not_all_listed(run: RunDir) -> None:
    class Many(Processes):
        def sample(self, gpu_memory: object = None) -> list[ProcessSample]:
            return [ProcessSample(pid=number, rss_bytes=2) for number in range(records.MOST_LISTED + 5)]

    sample = Look(QUICK, Many(-1, run.path)).sample()
    assert len(sample.processes) == records.MOST_LISTED and sample.unlisted == 5
    assert sample.rss_bytes == 2 * (records.MOST_LISTED + 5)


def test_samples_begin_dense_and_then_come_as_often_as_they_may(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pauses of a thread whose samples cost nothing, or 0.1 s of CPU."""
    monkeypatch.setattr(sampler, "_CPU_SHARE", 0.005)

    def pauses(cost: float, count: int) -> list[float]:
        settings = Settings(every_s=5.0, pss_every_s=60.0, bytes_per_day=1e9)
        one = Sampler(settings, run, "n1", "0.0", Processes(-1, run.path))
        clock, found = [0.0], []

        def sample(*_: object) -> None:
            clock[0] += cost

        def wait(pause: float) -> None:
            found.append(pause)
            if len(found) == count:
                one._over.set()

        monkeypatch.setattr(sampler.time, "thread_time", lambda: clock[0])
        monkeypatch.setattr(one, "_sample", sample)
        monkeypatch.setattr(one._over, "wait", wait)
        one._work(settings)
        return found

    assert pauses(0.0, 7) == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0]
    assert pauses(0.1, 7) == pytest.approx([20.0] * 7)


def test_signals_of_the_agent_are_not_held_up(run: RunDir) -> None:
    """A sample a millisecond, which no run takes, and the agent's handlers still run at once."""
    late: list[float] = []
    sent = [0.0]
    before = signal.signal(signal.SIGUSR1, lambda *_: late.append(time.perf_counter() - sent[0]))
    try:
        with sampling(run, replace(QUICK, every_s=0.001, pss_every_s=0.001)):
            enough(run)
            for number in range(50):
                sent[0] = time.perf_counter()
                os.kill(os.getpid(), signal.SIGUSR1)
                until(lambda count=number: len(late) > count, "the handler")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert sorted(late)[25] < 0.02, "half of them within a few of the interpreter's turns"
