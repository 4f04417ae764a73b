"""What comes into a run's folder of checkpoints, what is kept, what goes; and a kill -9 at every line of it."""

from __future__ import annotations

import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hpcdl.errors import SupersededError
from hpcdl.runs import files
from hpcdl.runs.state import RunState
from hpcdl.runs.store import RunDir
from hpcdl.spec.checkpoint import TRAINER, Found, check, folders, look, newest, read, step_of
from hpcdl.worker import keeping
from hpcdl.worker.keeping import Keeper
from hpcdl.worker.process import Process
from tests import checkpoints
from tests.factory import tiny_spec
from tests.killing import killed_at

WHO = Process(
    rank=0, world_size=2, local_rank=0, local_world_size=2, node="n1", attempt="0.0", restart=0
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    return run


def keeper_of(run: RunDir, *, last: int = 2, best: int = 0, attempt: str = "0.0") -> Keeper:
    trainer = tiny_spec(trainer__keep_last=last, trainer__keep_best=best).trainer
    return Keeper(run, dataclasses.replace(WHO, attempt=attempt), trainer)


def save(keeper: Keeper, step: int) -> None:
    """All that rank 0 does once the files are written."""
    temporary = keeper.temporary(step)
    keeper.publish(temporary, checkpoints.fill(temporary, step))
    keeper.prune()


def steps(run: RunDir) -> list[int]:
    return sorted(step_of(path) for path in folders(run.checkpoints))


def is_whole(found: Found) -> bool:
    return not any(check(found.path, name, file) for name, file in found.files.items())


def test_the_last_stay(run: RunDir) -> None:
    keeper = keeper_of(run, last=2)
    for step in (2, 4, 6):
        save(keeper, step)
    assert steps(run) == [4, 6]
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-00000004", "step-00000006"]


def test_the_best_stay_beside_the_last(run: RunDir) -> None:
    keeper = keeper_of(run, last=1, best=2)
    for step, loss in ((2, 3.0), (4, 1.5), (6, 1.0), (8, 2.0)):
        save(keeper, step)
        keeper.note(step, loss)
    assert steps(run) == [4, 6, 8]
    noted = {found.step: found.heldout_loss for path in folders(run.checkpoints) if (found := read(path))}
    assert noted == {4: 1.5, 6: 1.0, 8: 2.0}
    again = keeper_of(run, last=1, best=2)  # the next try knows it from the records
    save(again, 10)
    again.note(10, 1.2)
    assert steps(run) == [6, 10], "the last is among the best"


def test_a_loss_that_is_known_before_the_checkpoint_is_there(run: RunDir) -> None:
    keeper = keeper_of(run)
    keeper.note(2, 1.25)
    save(keeper, 2)
    found = read(run.checkpoints / "step-00000002")
    assert found is not None and found.heldout_loss == 1.25 and is_whole(found) and found.has_checksums


def test_a_loss_that_is_no_number_is_no_best(run: RunDir) -> None:
    keeper = keeper_of(run, last=1, best=1)
    for step, loss in ((2, 2.0), (4, float("nan")), (6, 3.0)):
        save(keeper, step)
        keeper.note(step, loss)
    assert steps(run) == [2, 6]


def test_damaged_ones_are_not_counted_and_go_with_the_next(run: RunDir) -> None:
    for step in (2, 4, 6, 8):
        checkpoints.make(run.checkpoints, step)
    checkpoints.flip(run.checkpoints / "step-00000008" / "__0_0.distcp")
    (run.checkpoints / "step-00000004" / "__1_0.distcp").unlink()
    keeper = keeper_of(run, last=2)
    keeper.passed_over = frozenset({"step-00000008"})
    keeper.prune()
    assert steps(run) == [2, 4, 6, 8], "nothing goes before something new is there"
    save(keeper, 7)
    assert steps(run) == [6, 7]


def test_a_damaged_one_is_replaced(run: RunDir) -> None:
    path = checkpoints.make(run.checkpoints, 8)
    checkpoints.flip(path / "__0_0.distcp")
    keeper = keeper_of(run)
    keeper.passed_over = frozenset({path.name})
    save(keeper, 8)
    found = read(path)
    assert found is not None and is_whole(found) and steps(run) == [8]


def test_a_try_that_is_over_changes_nothing(run: RunDir) -> None:
    old, new = keeper_of(run, last=1), keeper_of(run, last=1, attempt="0.1")
    save(old, 2)
    state = RunState(
        run_id="r", name="tiny", state="RUNNING", kind="slurm", nodes=1, world_size=2, max_steps=9,
        created="", running_try="0.1",
    )  # fmt: skip
    run.write_state(state)
    save(new, 4)
    assert steps(run) == [4]
    temporary = old.temporary(6)
    record = checkpoints.fill(temporary, 6)
    with pytest.raises(SupersededError, match=r"try 0\.1 .*the checkpoint of step 6 is not written"):
        old.publish(temporary, record)
    old.note(4, 1.0)
    old.prune()
    assert steps(run) == [4]
    found = read(run.checkpoints / "step-00000004")
    assert found is not None and found.heldout_loss is None
    new.clean()
    assert not temporary.exists()


def test_a_newer_one_of_another_is_left_alone(run: RunDir) -> None:
    """Had the older try looked at the fence just before the newer one came: its own goes, at most."""
    checkpoints.make(run.checkpoints, 20)
    save(keeper_of(run, last=1), 6)
    assert steps(run) == [20]


def test_a_record_that_can_not_be_noted_ends_nothing(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = keeper_of(run)
    save(keeper, 2)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keeping, "write_json", full)
    keeper.note(2, 1.0)
    assert "its held-out loss can't be noted" in run.events()[-1]["message"]


# --- kill -9


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel has got outlives a process: only a node's death needs fsync, which takes its time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


WATCHED = (keeping.__file__, files.__file__)


def is_watched(file: str) -> bool:
    return file in WATCHED


def test_killed_at_any_line_there_is_a_whole_one(tmp_path: Path, quick_disk: None) -> None:
    """A new one comes and an old one goes; step 4 is damaged, and is saved again."""
    number = 0
    while True:
        run = RunDir(tmp_path / f"run{number}")
        for step in (1, 2, 4):
            checkpoints.make(run.checkpoints, step)
        checkpoints.flip(run.checkpoints / "step-00000004" / TRAINER, at=30)

        def act(run: RunDir = run) -> None:
            keeper = keeper_of(run, last=1, best=1)
            keeper.passed_over = frozenset({"step-00000004"})
            keeper.clean()
            save(keeper, 4)
            keeper.note(4, 1.0)

        was_killed = killed_at(number, act, is_watched, most=2)
        found, broken = newest(run.checkpoints)
        assert found is not None and found.step in (2, 4) and is_whole(found), f"line {number}"
        assert [path.name for path, _ in broken] in ([], ["step-00000004"])
        # The next try goes on as if nothing had been.
        keeper = keeper_of(run, last=1)
        keeper.passed_over = frozenset(path.name for path, _ in broken)
        keeper.clean()
        save(keeper, 5)
        assert [p.name for p in run.checkpoints.iterdir()] == ["step-00000005"], f"line {number}"
        if not was_killed:
            break
        number += 1
    assert number > 60 and found.step == 4 and found.heldout_loss == 1.0


def test_killed_while_a_loss_is_noted_the_record_is_the_old_or_the_new(
    tmp_path: Path, quick_disk: None
) -> None:
    number = 0
    losses = set()
    while True:
        run = RunDir(tmp_path / f"run{number}")
        path = checkpoints.make(run.checkpoints, 2)
        keeper = keeper_of(run)
        was_killed = killed_at(number, partial(keeper.note, 2, 1.5), is_watched)
        found = look(path)
        assert isinstance(found, Found), f"line {number}: {found}"
        losses.add(found.heldout_loss)
        if not was_killed:
            break
        number += 1
    assert losses == {None, 1.5} and json.loads((path / TRAINER).read_text())["heldout_loss"] == 1.5
