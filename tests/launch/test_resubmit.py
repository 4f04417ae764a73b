"""`hpcdl resubmit`: the same runs go on, those that were meant and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcdl import cli
from hpcdl.launch.__main__ import main as launch_main
from hpcdl.runs.store import RunDir
from tests.fake_slurm import FakeSlurm

TINY = ("+experiment=pretrain_tiny", "cluster=slurm", "tracker=none", "parsable=true")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(capsys: pytest.CaptureFixture[str], *words: str) -> list[RunDir]:
    assert launch_main([*TINY, *words]) == 0, capsys.readouterr().err
    return [RunDir(Path(line.split("\t")[2])) for line in capsys.readouterr().out.splitlines()]


def sweep(capsys: pytest.CaptureFixture[str], *states: str) -> list[RunDir]:
    """A sweep whose runs have ended so."""
    runs = launch(capsys, "-m", f"seed={','.join(map(str, range(len(states))))}")
    for run, state in zip(runs, states, strict=True):
        run.update(state=state, job_id=run.read_state().job_id, reason="why not")
    return runs


def states(runs: list[RunDir]) -> list[str]:
    return [run.read_state().state for run in runs]


def resubmit(*words: str) -> int:
    return cli.main(["resubmit", *words])


ENDS = ("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "CANCELLED", "NODE_FAIL", "COMPLETED")


@pytest.mark.parametrize(
    ("only", "again"),
    [
        (["--only", "failed,timeout,oom"], (0, 1, 2)),
        (["--only", "OUT_OF_MEMORY"], (2,)),
        (["--only", "cancelled,node_fail"], (3, 4)),
        ([], (0, 1, 2, 4)),
    ],
)
def test_only_those_that_are_meant_and_in_one_array(
    only: list[str], again: tuple[int, ...], slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = sweep(capsys, *ENDS)
    assert resubmit("pretrain_tiny", *only) == 0
    err = capsys.readouterr().err
    assert states(runs) == ["PENDING" if i in again else end for i, end in enumerate(ENDS)]
    assert len(slurm.calls("sbatch")) == 2
    assert f"--array=0-{len(again) - 1}%" in slurm.calls("sbatch")[1]["script"]
    assert [runs[i].read_state().attempt for i in again] == [1] * len(again)
    assert "1 COMPLETED" in err


def test_a_sweep_by_its_id_keeps_ids_and_checkpoints(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = sweep(capsys, "FAILED", "COMPLETED")
    (runs[0].checkpoints / "step-00000010").mkdir(parents=True)
    (file,) = Path("runs/.sweeps").iterdir()
    assert resubmit(file.stem, "parsable=true") == 0
    out = capsys.readouterr().out
    assert out == f"{runs[0].path.name}\t2_0\t{runs[0].path}\n"
    assert (runs[0].checkpoints / "step-00000010").exists()
    assert (runs[0].path / "sweep.json").exists()


def test_overrides_of_what_is_no_part_of_the_run(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = sweep(capsys, "OUT_OF_MEMORY")
    assert (
        resubmit(run.path.name, "cluster.mem_gb=16", "cluster.time_min=90", "cluster.extra=[--exclusive]")
        == 0
    )
    script = slurm.calls("sbatch")[-1]["script"]
    assert all(f"#SBATCH {line}\n" in script for line in ("--mem=16384M", "--time=90", "--exclusive"))
    assert "mem_gb: 16" in run.spec_file.read_text()
    assert [path.parent.name for path in Path("runs").glob("*/*/state.json")] == [run.path.name]


def test_what_would_be_another_run_is_refused(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = sweep(capsys, "FAILED")
    words = ["trainer.max_steps=7", "cluster.mem_gb=1", "cluster.nodes=2", "cluster.mem_bg=3", "optim=sgd"]
    assert resubmit(run.path.name, *words) == 2
    err = capsys.readouterr().err
    assert "optim = sgd" in err and "single values" in err
    assert resubmit(run.path.name, *words[:4]) == 2
    assert "cluster.mem_gb" in capsys.readouterr().err.replace("mem_bg", "", 1), "the nearest name"
    assert resubmit(run.path.name, *words[:3]) == 2
    err = capsys.readouterr().err
    assert "2 faults" in err and "trainer.max_steps = 7" in err and "cluster.nodes = 2" in err
    assert "another run" in err and "cluster.mem_gb = 1" not in err
    assert states([run]) == ["FAILED"] and len(slurm.calls("sbatch")) == 1


@pytest.mark.parametrize("flag", ["--dry-run", "dry_run=true"])
def test_a_dry_run(flag: str, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    runs = sweep(capsys, *["FAILED"] * 10)
    before = [run.state_file.read_bytes() for run in runs]
    assert resubmit("pretrain_tiny", flag, "cluster.time_min=3") == 0
    out = capsys.readouterr().out
    assert "--array=0-9%10" in out and "--time=3" in out
    assert [run.state_file.read_bytes() for run in runs] == before
    assert resubmit("pretrain_tiny", "--yes", "cluster.time_min=3") == 0
    assert out.startswith(slurm.calls("sbatch")[-1]["script"]), "the very text"


def test_it_asks_before_ten(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = sweep(capsys, *["FAILED"] * 10)
    assert resubmit("pretrain_tiny") == 2
    assert "10 runs would be resubmitted: say --yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert resubmit("pretrain_tiny") == 1
    assert set(states(runs)) == {"FAILED"}
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert resubmit("pretrain_tiny") == 0
    assert set(states(runs)) == {"PENDING"}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["pretrain_tiny", "--only", "faild"], ["--only faild", "nearest name: failed"]),
        (["pretrain_tiny", "--only", "oom"], ["nothing to resubmit: of 1 runs, 1 FAILED"]),
        (["nobody"], ["no run is called nobody"]),
        (["cluster.mem_gb=3"], ["no run was named"]),
    ],
)
def test_called_wrongly(
    words: list[str], parts: list[str], slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(capsys, "FAILED")
    assert resubmit(*words) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in parts), err


def test_a_chain_is_taken_up_as_a_chain(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    (train,) = launch(capsys, "name=train")
    (other,) = launch(capsys, "name=other")
    (evaluation,) = launch(capsys, "name=eval", f"after={train.path.name},{other.path.name}")
    (export,) = launch(capsys, "name=export", f"after={evaluation.path.name}")
    other.update(state="COMPLETED")
    train.update(state="FAILED", reason="boom")
    for run in (evaluation, export):
        run.update(state="CANCELLED")
    assert resubmit("export", "eval", "--only", "cancelled") == 2
    assert f"waits for {train.path.name} (train), which is FAILED" in capsys.readouterr().err
    assert resubmit("export", "eval", "train", "--only", "failed,cancelled", "--dry-run") == 0
    assert f"--dependency=afterok:JOB_OF_{train.path.name}" in capsys.readouterr().out
    assert resubmit("export", "eval", "train", "--only", "failed,cancelled") == 0
    scripts = [call["script"] for call in slurm.calls("sbatch")][4:]
    found = [[line for line in text.splitlines() if "--dependency" in line] for text in scripts]
    assert found == [[], ["#SBATCH --dependency=afterok:5_0"], ["#SBATCH --dependency=afterok:6_0"]]
    assert states([train, evaluation, export]) == ["PENDING"] * 3
