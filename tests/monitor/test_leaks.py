"""What is a leak and what only looks like one; what is told of it, when, and what is not."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcdl.monitor import leaks, looking, records, watching
from hpcdl.monitor.leaks import MIB, Growth
from hpcdl.monitor.looking import Answer, Growing
from hpcdl.monitor.records import GpuSample, NodeSample, ProcessSample
from hpcdl.monitor.series import Gathered, Series, Who
from hpcdl.monitor.trend import Point, theil_sen
from hpcdl.monitor.watching import Settings, Watcher
from hpcdl.runs.beats import PHASES
from hpcdl.runs.store import RunDir

SERIES = Path(__file__).with_name("leak_series.jsonl")
RANK = Who(role="rank", rank=0, pid=7)


def series(size: Callable[[float], float], count: int = 160, noise: float = 0.2) -> list[Point]:
    """`size` in MiB over the share of the run that is done, with noise and now and then a spike."""
    chance = random.Random(count)
    spikes = (20.0 if chance.random() < 0.1 else 0.0 for _ in range(count))
    return [
        (step * 8.0, (300 + size(step / count) + chance.gauss(0, noise) + spike) * MIB)
        for step, spike in enumerate(spikes)
    ]


@pytest.mark.parametrize(
    "size",
    [
        lambda t: 10 * t,
        lambda t: 500 * t,
        lambda t: 100 * min(1, 5 * t) + 30 * t,
        lambda t: 5 * int(10 * t),
        lambda t: max(0, 50 * (t - 0.4)),
        lambda t: 30 * t * t,
        lambda t: 40 * t + (160 * t) % 12,
    ],
    ids=["slow", "fast", "after warm-up", "now and then", "from later on", "faster", "below a saw-tooth"],
)
def test_growth_without_an_end_is_a_leak(size: Callable[[float], float]) -> None:
    assert leaks.judge(series(size)).leak


@pytest.mark.parametrize(
    ("size", "why"),
    [
        (lambda t: 0, "doesn't grow"),
        (lambda t: 100 * min(1, t / 0.4), "flattens"),
        (lambda t: 100 * (1 - math.exp(-t / 0.2)), "flattens"),
        (lambda t: 30 * math.log(1 + 20 * t), "flattens"),
        (lambda t: 2.0 ** int(math.log2(1 + 160 * t)), "grows in a few jumps"),
        (lambda t: 20 * int(4 * t), "grows in a few jumps"),
        (lambda t: (160 * t) % 70, "no sure trend"),
        (lambda t: 50 * math.sin(math.pi * t), "doesn't grow"),
        (lambda t: 0.5 * t, "grows by less than 1.0 MiB"),
        (lambda t: -50 * t, "doesn't grow"),
    ],
    ids=["flat", "filled", "fills", "log", "doubles", "stages", "saw-tooth", "wave", "little", "shrinks"],
)
def test_what_ends_or_falls_is_none(size: Callable[[float], float], why: str) -> None:
    growth = leaks.judge(series(size, noise=0.05))
    assert (growth.leak, growth.why) == (False, why)


def test_too_few_samples_say_nothing() -> None:
    assert leaks.judge(series(lambda t: 100 * t)[:20]).why == "too few samples"
    assert leaks.judge([(1.0, float(n * MIB)) for n in range(100)]).why == "too few samples"
    assert not leaks.judge([]).leak


def test_noise_alone_is_hardly_ever_one() -> None:
    chance = random.Random(1)
    told = sum(
        leaks.judge([(float(step), chance.gauss(300, 3) * MIB) for step in range(150)]).leak
        for _ in range(100)
    )
    assert told == 0


def test_the_slope_withstands_what_is_far_off() -> None:
    points = [(float(x), 5.0 * x + (x * 37 % 11) / 10) for x in range(60)]
    wrong = [(x, y + 1e9 if x % 5 == 0 else y) for x, y in points]
    for these in (points, wrong):
        trend = theil_sen(these)
        assert trend.slope == pytest.approx(5, abs=0.02) and trend.low <= 5 <= trend.high
    assert theil_sen(points).tau == pytest.approx(1, abs=0.01)
    assert theil_sen([(3.0, 1.0), (3.0, 2.0)]).slope == 0.0


def test_the_interval_holds_what_it_says() -> None:
    """Of 200 lines with noise about 99 % hold the true slope; Sen's own bound, not a resampling."""
    chance = random.Random(4)
    hits = 0
    for _ in range(200):
        trend = theil_sen([(float(x), 2.0 * x + chance.gauss(0, 30)) for x in range(30)])
        hits += trend.low <= 2 <= trend.high
    assert 193 <= hits <= 200


def test_a_long_series_is_thinned_and_stays_small() -> None:
    one = Series()
    for step in range(20_000):
        one.add(step, step * 0.5, 1000.0 * step)
    assert 250 < len(one.points) <= 513 and one.seen == 20_000
    assert theil_sen(one.points).slope == pytest.approx(1000) and one.step_s == pytest.approx(0.5)


def sample(step: int, *processes: ProcessSample, phase: str = "step", **more: Any) -> NodeSample:
    rank = ProcessSample(pid=7, role="rank", rank=0, step=step, phase=phase, rss_bytes=300 * MIB)
    values = {"memory_available_bytes": 64 << 30, **more}
    seconds = f"2026-01-31T12:{step // 60 % 60:02}:{step % 60:02}+00:00"
    return NodeSample(time=seconds, node="n1", attempt="0.0", processes=processes or (rank,), **values)


def rank(step: int, size: float, phase: str = "step", **more: Any) -> ProcessSample:
    return ProcessSample(pid=7, role="rank", rank=0, step=step, phase=phase, rss_bytes=int(size), **more)


def test_mapped_files_and_other_phases_do_not_count() -> None:
    gathered = Gathered()
    for step in range(1, 60):
        size = 300 * MIB + step * MIB
        gathered.take(sample(step, rank(step, size, file_bytes=step * MIB)))
        gathered.take(sample(step, rank(step, 900 * MIB, phase="evaluation")))
    assert {size for _, size in gathered.series[RANK].points} == {300.0 * MIB}


def test_workers_of_a_loader_count_together_and_only_when_all_are_there() -> None:
    gathered = Gathered()
    for step in range(1, 90):
        workers = [
            ProcessSample(pid=100 * (step // 30) + n, role="loader", rank=0, rss_bytes=MIB * (50 + step % 30))
            for n in range(2 if step % 30 else 1)
        ]
        gathered.take(sample(step, rank(step, MIB), *workers))
    together = dict(gathered.judged())[Who(role="loader", rank=0)]
    assert min(size for _, size in together.points) >= 2 * 50 * MIB
    assert not leaks.judge(together.points).leak


class Told:
    """A watcher, with a process that answers as it is told to."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.run = RunDir(folder)
        self.said: list[str] = []
        self.folder = folder
        self.watcher = Watcher(Settings(**settings), self.run, "n1", "0.0", folder, self.said.append)

    def see(self, steps: range, size: Callable[[int], float], **more: Any) -> None:
        for step in steps:
            self.watcher.take(sample(step, rank(step, size(step)), **more))

    @property
    def leaks(self) -> list[dict[str, Any]]:
        return [event for event in self.run.events() if event["event"] == "leak"]


def answer(**more: Any) -> Answer:
    values: dict[str, Any] = {"pid": 7, "first_step": 100, "last_step": 130, "took_s": 0.1, **more}
    return Answer(**values)


def test_a_leak_is_told_once_with_what_the_process_says(tmp_path: Path) -> None:
    told = Told(tmp_path, last_step=200)
    ear = looking.Ear(tmp_path, 7)
    told.see(range(1, 100), lambda step: (300 + step) * MIB)
    assert told.leaks == [] and ear.asked() == 0
    told.see(range(100, 110), lambda step: (300 + step) * MIB)
    assert ear.asked() == 16 and ear.asked() == 0
    looking.write(
        tmp_path, answer(growing=(Growing(what="kept.append(x)", where="a.py:3", bytes_per_step=MIB),))
    )
    told.see(range(110, 200), lambda step: (300 + step) * MIB)
    (event,) = told.leaks
    assert event["process"] == {"role": "rank", "rank": 0, "pid": 7} and event["memory"] == "host"
    assert event["bytes_per_step"] == pytest.approx(MIB) and event["try"] == "0.0" and event["node"] == "n1"
    assert event["steps_until_full"] == pytest.approx(64 * 1024, rel=0.01)
    assert event["growing"] == [{"what": "kept.append(x)", "where": "a.py:3", "bytes_per_step": MIB}]
    assert event["message"] in told.said[0] and "a.py:3 kept.append(x)" in event["message"]


def test_what_malloc_holds_free_is_none(tmp_path: Path) -> None:
    told = Told(tmp_path, last_step=200)
    looking.Ear(tmp_path, 7)
    told.see(range(1, 105), lambda step: (300 + step) * MIB)
    looking.write(tmp_path, answer(malloc_used=100.0, malloc_free=0.9 * MIB, python=0.0))
    told.see(range(105, 110), lambda step: (300 + step) * MIB)
    assert told.leaks == [] and "holds it free" in told.said[0] and "no leak" in told.said[0]


def test_growth_that_has_ended_by_the_look_is_proved_anew_first(tmp_path: Path) -> None:
    told = Told(tmp_path, last_step=200)
    ear, nothing = looking.Ear(tmp_path, 7), answer(resident=0.0, malloc_used=10.0, python=0.0)
    for step in range(1, 400):
        told.see(range(step, step + 1), lambda step: (300 + min(step, 110) + max(0, step - 200)) * MIB)
        if ear.asked():
            looking.write(tmp_path, nothing)
        if step == 200:
            assert told.leaks == [] and told.said == []
    (event,) = told.leaks
    assert event["step"] > 220


def test_full_memory_soon_is_told_before_half_of_the_run(tmp_path: Path) -> None:
    told = Told(tmp_path, last_step=10_000)
    told.see(range(1, 60), lambda step: (300 + step) * MIB)
    assert told.leaks == []
    told.see(range(60, 100), lambda step: (300 + step) * MIB, memory_available_bytes=100 * MIB)
    (event,) = told.leaks
    assert event["steps_until_full"] == 100 and event["step"] < 70


def test_much_worse_is_told_again(tmp_path: Path) -> None:
    told = Told(tmp_path, last_step=100)
    told.see(range(1, 200), lambda step: (300 + step) * MIB)
    assert len(told.leaks) == 1
    told.see(range(200, 600), lambda step: (500 + 9 * (step - 200)) * MIB)
    first, second = (event["bytes_per_step"] / MIB for event in told.leaks)
    assert first == pytest.approx(1) and 2 < second < 9.5


def test_a_process_that_ends_is_told_of_as_it_is_known(tmp_path: Path) -> None:
    told = Told(tmp_path, last_step=100_000)
    told.see(range(1, 100), lambda step: (300 + step) * MIB)
    assert told.leaks == []
    told.watcher.take(sample(100, ProcessSample(pid=8, role="rank", rank=0, step=100, rss_bytes=1)))
    assert [event["process"]["pid"] for event in told.leaks] == [7]
    assert "not known" in told.leaks[0]["growing"][0]["what"]


def test_gpu_memory(tmp_path: Path) -> None:
    told = Told(tmp_path, last_step=100)
    gpus = (GpuSample(index=0, memory_total_bytes=80 << 30, memory_used_bytes=60 << 30),)
    for step in range(1, 120):
        one = rank(step, 300 * MIB, gpu_memory_bytes=(10 << 30) + 2 * MIB * step)
        told.watcher.take(sample(step, one, gpus=gpus))
    (event,) = told.leaks
    assert event["memory"] == "gpu" and event["steps_until_full"] == 20 * 512
    held = answer(cuda_allocated=0.0, cuda_reserved=2.0 * MIB)
    growth = Growth(leak=True, why="", bytes_per_step=2.0 * MIB)
    assert "torch's allocator" in watching.held_free(Who(memory="gpu", role="rank"), growth, held)
    assert watching.held_free(Who(memory="gpu"), growth, answer(cuda_allocated=2e6, cuda_reserved=2e6)) == ""


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (answer(malloc_used=1e6, resident=1e6), "in use through malloc"),
        (answer(malloc_used=0.0), "neither through malloc"),
        (answer(note="OSError: x"), "not known: OSError: x"),
        (None, "not known: the process was not asked"),
    ],
)
def test_what_no_line_explains_is_said(found: Answer | None, says: str) -> None:
    growth = Growth(leak=True, why="", bytes_per_step=1e6)
    (part,) = watching.parts(RANK, growth, found)
    assert says in part.what and part.bytes_per_step == pytest.approx(1e6)


def test_settings_of_older_specs_and_of_none() -> None:
    assert Settings.of({"monitor": {"name": "none"}}) is None
    assert Settings.of({"monitor": {"name": "default", "leaks": False}}) is None
    found = Settings.of({"monitor": {"name": "default", "leak_min_mib": 4}, "trainer": {"max_steps": 9}})
    assert found is not None and found.rules.least_bytes == 4 * MIB and found.last_step == 9


def test_the_verdicts_of_a_finished_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert leaks.of_run(run) == []
    with (tmp_path / "system-n1.jsonl").open("w") as file:
        for step in range(1, 100):
            other = ProcessSample(pid=9, role="torchrun", rss_bytes=MIB)
            line = records.as_line(sample(step, rank(step, (300 + step) * MIB), other))
            file.write(json.dumps(line) + "\n")
    first, second = leaks.of_run(run)
    assert (first.who, first.growth.leak, first.node, first.attempt) == (RANK, True, "n1", "0.0")
    assert first.steps_until_full == pytest.approx(64 * 1024) and first.step_s == pytest.approx(1.0)
    assert not second.growth.leak and second.steps_until_full is None


def replay(case: dict[str, Any], folder: Path) -> bool:
    """Whether the recorded samples are called a leak; nobody answers questions."""
    folder.mkdir()
    told = Told(folder, last_step=case["last_step"])
    step = size = 0
    for steps, phase, more, *workers in case["points"]:
        step, size = step + steps, size + more
        loaders = [
            ProcessSample(pid=100 + n, role="loader", rank=0, rss_bytes=kib * 1024)
            for n, kib in enumerate(workers)
        ]
        told.watcher.take(sample(step, rank(step, size * 1024, phase=PHASES[phase]), *loaders))
    told.watcher.close()
    return bool(told.leaks)


def test_recorded_leaks_and_healthy_runs(tmp_path: Path) -> None:
    """Samples of real processes (benchmarks/leaks.py --record): precision and recall of the verdicts alone."""
    cases = [json.loads(line) for line in SERIES.read_text().splitlines()]
    called = {case["name"]: replay(case, tmp_path / case["name"]) for case in cases}
    leaking = {case["name"] for case in cases if case["leaks"]}
    right = {name for name in leaking if called[name]}
    assert len(leaking) >= 20 and len(cases) - len(leaking) >= 20
    assert len(right) >= 0.95 * len(leaking), leaking - right
    wrong = {name for name, is_one in called.items() if is_one} - leaking
    assert len(right) >= 0.95 * (len(right) + len(wrong)), wrong


def test_a_leak_in_words() -> None:
    one = watching.Leak(
        node="n1", attempt="0.0", who=dataclasses.replace(RANK, role="loader"),
        growth=Growth(leak=True, why="", bytes_per_step=1.5 * MIB, interval=(1.25 * MIB, 2.0 * MIB), last_step=9),
        steps_until_full=1200.4, step_s=None, growing=(), look=None,
    )  # fmt: skip
    assert one.message == (
        "a DataLoader worker (pid 7) of rank 0 on n1 leaks 1.5 MiB of memory a step (1.25 MiB to 2 MiB):"
        " full in 1,200 steps"
    )
    assert one.event()["full_at"] is None
