"""Programs that take turns, and the proof that they did the same."""

import json
import sys
from pathlib import Path

import pytest
import training
from _timing import interval, mark
from _turns import Gatekeeper, Program, TurnError, end, start

LOOP = """
import sys
sys.path.insert(0, {folder!r})
from gate import Gate
gate = Gate()
for step in range({steps}):
    gate.step()
    if step == {fails}:
        sys.exit("out of ideas")
"""
FOLDER = str(Path(training.__file__).parent / "peers")


def program(name: str, folder: Path, *, fails: int = -1) -> Program:
    log = folder / f"{name}.log"
    code = LOOP.format(folder=FOLDER, steps=20, fails=fails)
    env = {"BENCH_GATE": str(folder / "gate"), "BENCH_NAME": name}
    return Program(name, [start((sys.executable, "-c", code), env, log)], log, 1)


def test_programs_take_turns(tmp_path: Path) -> None:
    keeper = Gatekeeper(tmp_path)
    programs = [program(name, tmp_path) for name in ("a", "b")]
    try:
        keeper.gather(programs)
        for _ in range(3):
            for one in programs:
                took = keeper.turn(one, 5)
                assert 0 < took.wall_s < 10
                assert took.cpu_s >= 0
        assert all(one.peak_bytes > 2**20 for one in programs)
        for one in programs:
            keeper.dismiss(one)
    finally:
        end(programs)
        keeper.close()


def test_one_that_fails_says_why(tmp_path: Path) -> None:
    keeper = Gatekeeper(tmp_path)
    programs = [program("a", tmp_path, fails=3)]
    try:
        keeper.gather(programs)
        with pytest.raises(TurnError, match=r"(?s)a (failed|left amid its turn).*out of ideas"):
            keeper.turn(programs[0], 5)
    finally:
        end(programs)
        keeper.close()


def left(folder: Path, name: str, hashes: list[str], losses: list[float]) -> Program:
    (folder / f"{name}-0.json").write_text(json.dumps({"hashes": hashes, "losses": losses}))
    return Program(name, [], folder / "log", 1)


def test_the_same_work_is_compared(tmp_path: Path) -> None:
    torch = left(tmp_path, "torch", ["x", "y"], [60.0, 40.0])  # sums over 10 targets
    ours = left(tmp_path, "hpcdl", ["x", "y"], [6.0, 4.00002])  # means already
    found = training.must_be_alike(tmp_path, [torch, ours], [10, 10])
    assert found["steps_compared"] == 2
    assert found["losses_apart"] == pytest.approx(5e-6)


@pytest.mark.parametrize(
    ("hashes", "losses", "words"),
    [
        (["x", "z"], [6.0, 4.0], "hpcdl has read other batches than torch: from step 2 on"),
        (["x"], [6.0], "hpcdl has read other batches than torch: 1 steps and 2"),
        (["x", "y"], [6.0, 4.0001], "hpcdl's loss of step 2 is 4.0001"),
        (["x", "y"], [6.0, float("nan")], "hpcdl's loss of step 2 is nan"),
    ],
)
def test_other_work_is_refused(tmp_path: Path, hashes: list[str], losses: list[float], words: str) -> None:
    programs = [left(tmp_path, "torch", ["x", "y"], [60.0, 40.0]), left(tmp_path, "hpcdl", hashes, losses)]
    with pytest.raises(TurnError, match=words):
        training.must_be_alike(tmp_path, programs, [10, 10])


def test_an_interval_tells_noise_from_a_difference() -> None:
    plain = [1.0, 1.1, 0.9, 1.05, 0.95] * 4
    same = interval(plain[::-1], plain)
    slower = interval([1.3 * one for one in plain], plain)
    assert same.low <= 1.0 <= same.high
    assert mark(same.low, same.high) == "even"
    assert slower.median == pytest.approx(1.3)
    assert mark(slower.low, slower.high) == "**hpcdl loses**"
    assert mark(0.8, 0.9) == "hpcdl wins"
