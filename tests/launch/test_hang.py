"""A hang told from slow progress; who has not come; stacks also of a rank that sits in C code."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpcdl.launch import hang, stacks
from hpcdl.launch.hang import Hang, Limits, Watch
from hpcdl.launch.stacks import Look
from hpcdl.runs import beats
from hpcdl.runs.beats import Beat, Heart
from hpcdl.runs.store import RunDir
from tests.launch.making import until

LIMITS = Limits(factor=10, min_s=3, quiet_s=60)
WAIT = "hpcdl/worker/control.py:31 wait"


def beat(count: int, rank: int = 0, step: int | None = None, phase: str = "step", **more: Any) -> Beat:
    values = {"pid": 1, "restart": 0, **more}
    return Beat(rank=rank, step=count if step is None else step, count=count, phase=phase, **values)


def listen(watch: Watch, every_s: float, *counts: int, **more: Any) -> list[bool]:
    """Whether each of the signs, `every_s` seconds apart, is taken for a hang."""
    return [watch.hear([beat(count, **more)], every_s) is not None for count in counts]


def test_no_step_for_many_times_the_median(tmp_path: Path) -> None:
    watch = Watch(tmp_path, LIMITS)
    assert not any(listen(watch, 1.0, 1, 2, 3, 4, 5))
    assert listen(watch, 1.0, *[5] * 11) == [False] * 10 + [True]


def test_a_slow_step_is_none(tmp_path: Path) -> None:
    watch = Watch(tmp_path, LIMITS)
    assert not any(listen(watch, 1.0, 1, 2, 3, 4, *[4] * 9, 5, *[5] * 9, 6))


def test_many_steps_a_second_and_never_before_min_s(tmp_path: Path) -> None:
    watch = Watch(tmp_path, LIMITS)
    assert not any(listen(watch, 1.0, 100, 200, 300, 400))
    assert listen(watch, 1.0, 400, 400, 400, 400) == [False, False, False, True]


@pytest.mark.parametrize("phase", ["start", "evaluation", "checkpoint", "end"])
def test_what_is_no_step_has_longer(tmp_path: Path, phase: str) -> None:
    watch = Watch(tmp_path, LIMITS)
    assert not any(listen(watch, 1.0, 1, 2, 3, 4))
    assert not any(listen(watch, 1.0, *[5] * 60, phase=phase))
    assert listen(watch, 1.0, 5, 5, phase=phase)[-1]


def test_the_first_steps_have_longer_too(tmp_path: Path) -> None:
    watch = Watch(tmp_path, LIMITS)
    assert not any(listen(watch, 1.0, 1, 2, *[2] * 60))
    assert listen(watch, 1.0, 2) == [True]


def test_a_restart_begins_anew(tmp_path: Path) -> None:
    watch = Watch(tmp_path, LIMITS)
    listen(watch, 1.0, 1, 2, 3, 4, *[4] * 9)
    assert not any(listen(watch, 1.0, *[1] * 30, pid=2, restart=1))


def test_one_silent_rank_of_two_is_enough_and_all_are_told_of(tmp_path: Path) -> None:
    watch = Watch(tmp_path, LIMITS)
    for count in range(1, 30):
        found = watch.hear([beat(count), beat(min(count, 5), rank=1)], 1.0)
        if found is not None:
            break
    assert found is not None and count == 16
    assert [one.rank for one in found.beats] == [0, 1]
    assert found.words == "no step for 11 s after step 16 (limit 10 s; the median step takes 1 s)"


def test_nobody_listens_where_the_factor_is_0(tmp_path: Path) -> None:
    watch = Watch(tmp_path, Limits.of({"every_s": 5.0}))
    Heart(tmp_path, 0, 0)
    assert watch.look() is None


def test_signs_cross_by_the_file(tmp_path: Path) -> None:
    heart = Heart(tmp_path, 3, 1)
    heart.say("step", 7)
    assert heart.say("evaluation") == "step"
    (said,) = beats.listen(tmp_path)
    assert (said.rank, said.restart, said.step, said.phase, said.count) == (3, 1, 7, "evaluation", 3)
    (tmp_path / "rank-4").write_bytes(b"half")
    assert len(beats.listen(tmp_path)) == 1
    assert Watch(tmp_path, LIMITS).step() == 7


def test_a_restarts_signs_leave_those_before_it(tmp_path: Path) -> None:
    Heart(tmp_path, 0, 0).say("step", 7)
    Heart(tmp_path, 0, 1).say("start", 4)
    watch = Watch(tmp_path, LIMITS)
    assert (watch.step(), watch.step(0), watch.step(1), watch.step(2)) == (4, 7, 4, 0)
    for file in tmp_path.glob("rank-*"):
        file.unlink()
    assert watch.step() == 4, "as it was last seen"


def look(rank: int, *frames: str, step: int = 5, state: str = "S") -> Look:
    return Look(rank=rank, node=f"c{rank + 1}", step=step, phase="step", state=state, frames=frames)


@pytest.mark.parametrize(
    ("looks", "differ"),
    [
        ([look(0, WAIT), look(1, "data/loader.py:9 next"), look(2, WAIT)], [1]),
        ([look(0, WAIT), look(1, WAIT, state="T"), look(2, WAIT)], [1]),
        ([look(0, WAIT), look(1)], [1]),
        ([look(0, WAIT), look(1, WAIT, state="")], [1]),
        ([look(0, WAIT, step=6), look(1, WAIT, step=5), look(2, WAIT, step=6)], [1]),
        ([look(0, WAIT, "a:1 f"), look(1, WAIT, "a:1 f"), look(2, WAIT, "b:7 g")], [2]),
        ([look(0, "torch/distributed/distributed_c10d.py:3 wait"), look(1, "x/a.py:1 f")], [1]),
        ([look(0, "torch/autograd/graph.py:3 _engine_run_backward"), look(1, "x/a.py:1 f")], [1]),
        ([look(0, WAIT), look(1, WAIT)], []),
        ([look(0, "x/a.py:1 f")], []),
    ],
)
def test_who_has_not_come(looks: list[Look], differ: list[int]) -> None:
    assert [one.rank for one in stacks.differing(looks)] == differ


def test_the_cause_says_where_everybody_is(tmp_path: Path) -> None:
    found = Hang(silent_s=61.0, limit_s=60.0, median_s=0.5, beats=(beat(41, rank=0), beat(41, rank=2)))
    looks = [look(0, WAIT, step=41), look(1, "data/loader.py:9 next", step=41), look(2, WAIT, step=41)]
    cause = hang.cause(found, looks, "c1")
    assert (cause.kind, cause.rank, cause.node, cause.step) == ("hang", 1, "c2", 41)
    assert cause.message == (
        "no step for 61 s after step 41 (limit 60 s; the median step takes 0.5 s): "
        f"rank 1 (c2) in data/loader.py:9 next; ranks 0, 2 waiting in {WAIT}"
    )


def test_nodes_tell_each_other_where_their_ranks_are(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.errors.mkdir()
    found: list[list[Look]] = []
    other = threading.Thread(target=lambda: found.append(stacks.gather(run, "0.0", 1, 1, 2, [look(1)])))
    other.start()
    mine = stacks.gather(run, "0.0", 1, 0, 2, [look(0, WAIT)])
    other.join()
    assert mine == found[0] == [look(0, WAIT), look(1)]


RANK = """
import os, sys, threading
from hpcdl.worker import heartbeat, process
who = process.from_environment()
progress = heartbeat.start(who)
progress.begin(5)
threading.Thread(target=threading.Event().wait, daemon=True).start()

def stuck():
    lock = threading.Lock()
    lock.acquire()
    open(os.environ["THERE"], "w").close()
    lock.acquire()  # in C, for ever

stuck()
"""


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    (tmp_path / "worker").mkdir()
    (tmp_path / "worker" / "main.py").write_text(RANK)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "worker" / "main.py"],
        env={beats.FOLDER: str(tmp_path), "RANK": "2", "THERE": str(tmp_path / "there")},
    )  # fmt: skip
    rank = psutil.Process(process.pid)
    until(lambda: (tmp_path / "there").exists() and rank.status() == "sleeping", "the rank is stuck")
    yield process
    process.kill()
    process.wait()


def test_a_rank_in_c_code_is_dumped(tmp_path: Path, stuck: subprocess.Popen[bytes]) -> None:
    run = RunDir(tmp_path / "run")
    run.errors.mkdir(parents=True)
    watch = Watch(tmp_path, Limits(factor=1, min_s=1, quiet_s=1))
    until(lambda: any(one.step == 5 for one in beats.listen(tmp_path)), "the first sign")
    watch.hear(beats.listen(tmp_path), 1.0)
    found = watch.hear(beats.listen(tmp_path), 2.0)
    assert found is not None
    (seen,) = watch.dump(found, run, "0.0", "c1")
    assert (seen.rank, seen.step, seen.state) == (2, 5, "S")
    assert seen.frames[:2] == ("worker/main.py:13 stuck", "worker/main.py:15 <module>")
    text = (run.errors / "try0.0-restart0-rank2-stacks.txt").read_text()
    assert text.count("most recent call first") == 2, "all threads"


def test_a_stopped_rank_gives_no_answer(
    tmp_path: Path, stuck: subprocess.Popen[bytes], monkeypatch: Any
) -> None:
    monkeypatch.setattr(hang, "_DUMP_LIMIT_S", 0.3)
    run = RunDir(tmp_path / "run")
    run.errors.mkdir(parents=True)
    until(lambda: beats.listen(tmp_path), "the first sign")
    stuck.send_signal(19)  # SIGSTOP
    (seen,) = Watch(tmp_path, LIMITS).dump(
        Hang(silent_s=1, limit_s=1, median_s=None, beats=tuple(beats.listen(tmp_path))), run, "0.0", "c1"
    )
    assert (seen.frames, seen.where) == ((), "stopped (SIGSTOP)")
