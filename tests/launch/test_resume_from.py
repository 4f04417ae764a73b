"""`trainer.resume_from` at launch: what it may name, what is recorded, what is refused before submission."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcdl.launch.__main__ import main
from hpcdl.spec.plain import load_yaml
from tests.fake_slurm import FakeSlurm

TINY = ("+experiment=pretrain_tiny", "cluster=slurm", "parsable=true")
RUN = "0123456789ab"


@pytest.fixture(autouse=True)
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with checkpoints of steps 10 and 20, in the `runs` of an empty folder to launch in."""
    work = tmp_path / "work"
    run = work / "runs" / "first" / RUN
    run.mkdir(parents=True)
    (run / "spec.yaml").write_text("name: first\n")
    for step in (10, 20):
        checkpoint(run, step)
    (work / "runs" / "latest").symlink_to(run)
    monkeypatch.chdir(work)
    return run


def checkpoint(run: Path, step: int, **changes: Any) -> Path:
    """A whole checkpoint, as far as the launcher looks."""
    path = run / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"12345")
    record = {
        "totals": {"step": step, "tokens": 100 * step},
        "world_size": 2,
        "data_digest": "d",
        "seed": 0,
        "global_batch_size": 16,
        "files": {"__0_0.distcp": 5},
    }
    (path / "trainer.json").write_text(json.dumps({**record, **changes}))
    return path


def recorded(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What spec.yaml says of a launch."""
    assert main([*TINY, *words]) == 0
    run_dir = capsys.readouterr().out.split("\t")[2].strip()
    return str(load_yaml(Path(run_dir) / "spec.yaml")["trainer"]["resume_from"])


@pytest.mark.parametrize(
    "given",
    [RUN, RUN[:5], "first", "latest", f"runs/first/{RUN}", f"runs/first/{RUN}/checkpoints", "runs/latest"],
)
def test_a_run_is_its_newest_checkpoint(
    source: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    found = recorded(capsys, f"trainer.resume_from='{given}'")
    assert Path(found).is_absolute()
    assert Path(found).resolve() == source / "checkpoints" / "step-00000020"


def test_a_torn_checkpoint_is_passed_over(
    source: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "checkpoints" / "step-00000020" / "__0_0.distcp").write_bytes(b"1234")
    assert recorded(capsys, f"trainer.resume_from='{RUN}'") == str(source / "checkpoints" / "step-00000010")


def test_an_older_checkpoint_by_its_path(
    source: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    path = source / "checkpoints" / "step-00000010"
    assert recorded(capsys, f"trainer.resume_from={path}") == str(path)


def test_a_run_that_goes_on_is_another_run(
    source: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Than the same from the start, and than from another checkpoint; the same as itself."""
    older = source / "checkpoints" / "step-00000010"
    ids = []
    for words in ([], [f"trainer.resume_from={source}"], [f"trainer.resume_from={older}"]):
        assert main([*TINY, *words]) == 0
        ids.append(capsys.readouterr().out.split("\t")[0])
    assert len(set(ids)) == 3
    assert main([*TINY, f"trainer.resume_from='{RUN}'"]) == 0
    assert capsys.readouterr().out.split("\t")[0] == ids[1]


BROKEN: list[tuple[list[str], list[str]]] = [
    (
        [f"trainer.resume_from='{RUN[:-1]}c'"],
        [f"trainer.resume_from = {RUN[:-1]}c", "is called so", f"nearest: {RUN}", f"trainer.resume_from={RUN}"],
    ),
    (["trainer.resume_from=frist"], ["nearest: first"]),
    (["trainer.resume_from=runs/frist"], ["no such folder", "nearest: first"]),
    (["trainer.resume_from=/no/such/place"], ["no such folder"]),
    ([f"trainer.resume_from=runs/first/{RUN}/spec.yaml"], ["no such folder"]),
    (["trainer.resume_from=runs"], ["no whole checkpoint in"]),
    ([f"trainer.resume_from={'x' * 300}"], ["is called so"]),
    (["trainer.resume_from=''"], ["nothing was submitted"]),
    (["trainer.resume_from=[a]"], ["trainer.resume_from"]),
    (
        [f"trainer.resume_from='{RUN}'", "trainer.max_steps=19"],
        ["trainer.max_steps = 19", "has done 20 steps", "at least 20"],
    ),
    ([f"trainer.resume_from='{RUN}'", "seed=3"], ["seed = 3", "other batches", "fix:     seed=0"]),
    (
        [f"trainer.resume_from='{RUN}'", "trainer.global_batch_size=8"],
        ["trainer.global_batch_size = 8", "fix:     trainer.global_batch_size=16"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("words", "parts"), BROKEN, ids=lambda value: " ".join(value)[:60])
def test_what_can_not_be_gone_on_from(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, *words]) == 2
    out, err = capsys.readouterr()
    assert not out and "Traceback" not in err
    for part in (*parts, "nothing was submitted"):
        assert part in err, err


def test_no_whole_checkpoint(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A torn one by its path names the whole one; a run without any says how it gets one."""
    torn = source / "checkpoints" / "step-00000020"
    (torn / "trainer.json").unlink()
    assert main([*TINY, f"trainer.resume_from={torn}"]) == 2
    err = capsys.readouterr().err
    assert f"nearest: {source / 'checkpoints' / 'step-00000010'}" in err
    empty = source.parent / "ba9876543210"
    empty.mkdir()
    (empty / "spec.yaml").write_text("name: first\n")
    assert main([*TINY, "trainer.resume_from=ba98"]) == 2
    assert "trainer.checkpoint_every" in capsys.readouterr().err
    assert main([*TINY, "trainer.resume_from=first"]) == 2
    assert "2 runs are called so" in capsys.readouterr().err


def test_a_sweep_leaves_out_what_does_not_go_on(
    source: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-m", *TINY, f"trainer.resume_from='{RUN}'", "seed=0,1"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and "seed=1" in err
