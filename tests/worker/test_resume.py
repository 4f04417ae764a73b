"""Which checkpoint a run goes on from: the newest that is whole to its last byte, the same on all ranks."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcdl.errors import HpcdlError
from hpcdl.runs.store import RunDir
from hpcdl.spec.checkpoint import TRAINER, Found, read
from hpcdl.worker.process import Process
from tests import checkpoints
from tests.factory import tiny_spec

pytestmark = pytest.mark.torch

Choose = Callable[..., "Found | None"]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    for step in (2, 4, 6):
        checkpoints.make(run.checkpoints, step)
    return run


@pytest.fixture
def choose(run: RunDir) -> Iterator[Choose]:
    """Chooses as a world of one."""
    import torch
    import torch.distributed as dist

    from hpcdl.worker import resume
    from hpcdl.worker.keeping import Keeper
    from hpcdl.worker.process import from_environment

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    who = from_environment()
    keeper = Keeper(run, who, tiny_spec().trainer)

    def chosen(resume_from: Path | None = None) -> Found | None:
        place = None if resume_from is None else str(resume_from)
        found = resume.choose(run, who, keeper, torch.zeros(()), torch.device("cpu"), place)
        chosen.passed_over = sorted(keeper.passed_over)  # type: ignore[attr-defined]
        return found

    yield chosen
    dist.destroy_process_group()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "torn": (lambda p: truncate(p / "__1_0.distcp"), "torn: __1_0.distcp has 22 bytes"),
    "missing": (lambda p: (p / "__0_0.distcp").unlink(), "torn: __0_0.distcp is missing"),
    "changed": (lambda p: checkpoints.flip(p / "__0_0.distcp"), "corrupt: __0_0.distcp has CRC-32"),
    "no_index": (lambda p: (p / ".metadata").unlink(), "torn: .metadata is missing"),
    "no_record": (lambda p: (p / TRAINER).unlink(), f"torn: {TRAINER} is missing"),
    "a_changed_record": (lambda p: checkpoints.flip(p / TRAINER, at=8), f"corrupt: {TRAINER}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_one_is_passed_over(run: RunDir, choose: Choose, damage: str) -> None:
    do, words = DAMAGES[damage]
    do(run.checkpoints / "step-00000006")
    found = choose()
    assert found is not None and found.step == 4
    (event,) = run.events()
    assert event["event"] == "warning" and event["checkpoint"] == "step-00000006"
    assert event["message"].startswith(f"checkpoint step-00000006 is {words}")
    assert event["message"].endswith(": passed over")
    assert choose.passed_over == ["step-00000006"]  # type: ignore[attr-defined]


def test_one_that_is_gone_is_told(run: RunDir, choose: Choose) -> None:
    for step in (6, 8):
        run.event("checkpoint", step=step)
    found = choose()
    assert found is not None and found.step == 6
    (event,) = [e for e in run.events() if e["event"] == "warning"]
    assert event["message"] == "checkpoint step-00000008 was saved, and is not there any more: passed over"
    run.event("checkpoint", step=6)  # saved again since
    choose()
    assert len([e for e in run.events() if e["event"] == "warning"]) == 1


def test_several_are_passed_over(run: RunDir, choose: Choose) -> None:
    checkpoints.flip(run.checkpoints / "step-00000006" / "__0_0.distcp")
    (run.checkpoints / "step-00000004" / ".metadata").unlink()
    found = choose()
    assert found is not None and found.step == 2
    assert [e["checkpoint"] for e in run.events()] == ["step-00000006", "step-00000004"]


def test_where_none_is_whole_it_begins_anew(run: RunDir, choose: Choose) -> None:
    for path in run.checkpoints.iterdir():
        (path / "__0_0.distcp").unlink()
    assert choose() is None
    assert run.events()[-1]["message"] == "no checkpoint is whole: training begins anew"


def test_another_runs_is_verified_too(run: RunDir, choose: Choose, tmp_path: Path) -> None:
    other = checkpoints.make(tmp_path / "other" / "checkpoints", 8)
    for path in run.checkpoints.iterdir():
        (path / TRAINER).unlink()
    found = choose(other)
    assert found is not None and found.path == other
    checkpoints.flip(other / "__1_0.distcp")
    with pytest.raises(HpcdlError, match=r"no whole checkpoint any more \(corrupt: __1_0.distcp has CRC-32"):
        choose(other)


def test_one_without_checksums_is_read(run: RunDir, choose: Choose) -> None:
    path = run.checkpoints / "step-00000006"
    record = json.loads((path / TRAINER).read_text())
    (path / TRAINER).write_text(json.dumps({k: v for k, v in record.items() if k not in ("crc32", "seal")}))
    found = choose()
    assert found is not None and found.step == 6 and not run.events()


# --- several ranks: each reads its share, in threads here


def rank_of(number: int, world: int) -> Process:
    return Process(
        rank=number, world_size=world, local_rank=0, local_world_size=1, node=f"n{number}", attempt="0.0",
        restart=0,
    )  # fmt: skip


def verified(path: Path, world: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each rank of a world comes to; collectives are a barrier between threads."""
    from hpcdl.worker import resume

    said: dict[int, Any] = {}
    barrier = threading.Barrier(world, timeout=60)

    def words_of_all(word: Any) -> list[Any]:
        said[int(threading.current_thread().name)] = word
        barrier.wait()
        return [said[rank] for rank in range(world)]

    monkeypatch.setattr(resume, "words_of_all", words_of_all)
    answers: list[Any] = [None] * world

    def rank(number: int) -> None:
        try:
            answers[number] = resume._verified(path, rank_of(number, world))
        except HpcdlError as error:
            answers[number] = error

    threads = [threading.Thread(target=rank, args=(n,), name=str(n)) for n in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("file", sorted(checkpoints.FILES))
def test_all_ranks_come_to_the_same(
    run: RunDir, world: int, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run.checkpoints / "step-00000006"
    assert {answer.step for answer in verified(path, world, monkeypatch)} == {6}
    checkpoints.flip(path / file)
    answers = verified(path, world, monkeypatch)
    assert {(damage.file, damage.torn) for damage in answers} == {(file, False)}


def test_files_are_shared_out_by_their_size(run: RunDir) -> None:
    from hpcdl.worker import resume

    path = run.checkpoints / "step-00000006"
    found = read(path)
    assert found is not None
    shares = [resume._share(found, rank_of(number, 2)) for number in range(2)]
    assert shares == [["__0_0.distcp", ".metadata"], ["__1_0.distcp"]]
    assert [name for n in range(9) for name in resume._share(found, rank_of(n, 9))] == [
        *shares[0][:1],
        *shares[1],
        ".metadata",
    ]


def test_a_node_that_does_not_see_it_is_named(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpcdl.worker import resume

    monkeypatch.setattr(resume, "PATIENCE_S", 0.3)
    real = resume.look

    def seen(path: Path) -> Any:
        elsewhere = path.with_name("elsewhere") if threading.current_thread().name == "1" else path
        return real(elsewhere)

    monkeypatch.setattr(resume, "look", seen)
    answers = verified(run.checkpoints / "step-00000006", 3, monkeypatch)
    assert {str(answer).split(":")[0].split(", which")[0] for answer in answers} == {
        f"n1 can't read {run.checkpoints / 'step-00000006'}"
    }
    assert all("is the disk shared by all nodes?" in str(answer) for answer in answers)


def test_a_node_that_sees_it_late_is_waited_for(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS may keep for some seconds what it knew of a folder."""
    from hpcdl.worker import resume

    monkeypatch.setattr(resume, "LOOK_EVERY_S", 0.01)
    real, looks = resume.look, []

    def seen(path: Path) -> Any:
        if threading.current_thread().name == "1":
            looks.append(path)
            if len(looks) < 4:
                return real(path.with_name("elsewhere"))
        return real(path)

    monkeypatch.setattr(resume, "look", seen)
    answers = verified(run.checkpoints / "step-00000006", 2, monkeypatch)
    assert [answer.step for answer in answers] == [6, 6] and len(looks) == 4
