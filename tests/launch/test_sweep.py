"""Sweeps with points that can't be: these are left out, told and recorded; the others go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcdl import experiment
from hpcdl.errors import ConfigError
from hpcdl.launch import by_hand
from hpcdl.launch.__main__ import main
from hpcdl.runs.store import RunDir
from hpcdl.spec.plain import load_yaml
from tests.factory import tiny_plain
from tests.fake_slurm import FakeSlurm

TINY = ("-m", "+experiment=pretrain_tiny", "cluster=slurm_docker")
NODES = (*TINY, "cluster.nodes=1,5,2,3")
"""Two of these can't be: the partition has four nodes, and three don't divide the batch."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record() -> dict[str, object]:
    (file,) = Path("runs/.sweeps").iterdir()
    return dict(json.loads(file.read_text()))


def test_points_that_cannot_be_are_listed_and_the_others_go_on(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*NODES]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert "2 runs: 2 submitted" in out
    assert "refused    2 points that can't be" in out
    refused = [line.strip() for line in out.splitlines() if line.startswith("  cluster.nodes=")]
    assert refused[0].startswith(
        "cluster.nodes=5  cluster.nodes = 5: partition debug has 4 nodes (and 1 more)"
    )
    assert refused[1].startswith("cluster.nodes=3  trainer.global_batch_size = 16: is not a multiple of 12")
    assert "hpcdl compare sweep-" in out
    assert len(slurm.calls("sbatch")) == 2


def test_for_scripts_standard_output_stays_a_line_a_run(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*NODES, "parsable=true"]) == 0
    out, err = capsys.readouterr()
    assert [len(line.split("\t")) for line in out.splitlines()] == [3, 3]
    assert [line.split(":")[1].strip() for line in err.splitlines()] == ["cluster.nodes=5", "cluster.nodes=3"]


def test_a_dry_run_notes_them(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NODES, "dry_run=true"]) == 0
    out, err = capsys.readouterr()
    assert out.count("#!/bin/bash") == 2
    assert "# refused: cluster.nodes=5: cluster.nodes = 5: partition debug has 4 nodes" in err
    assert not Path("runs").exists()


def test_they_are_recorded_with_the_sweep(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NODES]) == 0
    found = record()
    assert [point["overrides"] for point in found["points"]] == ["cluster.nodes=1", "cluster.nodes=2"]  # type: ignore[attr-defined]
    (five, three) = found["refused"]  # type: ignore[misc]
    assert five["overrides"] == "cluster.nodes=5" and "4 nodes" in five["reason"]
    assert [fault["key"] for fault in five["faults"]] == ["cluster.nodes", "trainer.global_batch_size"]
    assert three["faults"][0]["fix"].startswith("trainer.global_batch_size=")


def test_the_id_tells_sweeps_apart_that_differ_in_what_cannot_be(slurm: FakeSlurm) -> None:
    for last in ("5", "3", "5"):
        assert main([*TINY, f"cluster.nodes=1,2,{last}"]) == 0
    assert len(list(Path("runs/.sweeps").iterdir())) == 2


def test_a_single_point_that_is_left_is_still_a_sweep(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "cluster.nodes=1,3"]) == 0
    assert "1 run: 1 submitted" in capsys.readouterr().out
    assert len(record()["refused"]) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["cluster.nodes=1,5", "strict=true"], ["partition debug has 4 nodes", "in:      cluster.nodes=5"]),
        (["cluster.nodes=5,6"], ["cluster.nodes = 5", "cluster.nodes = 6"]),
        (["cluster.nodes=1,2", "trainer.global_batch_size=7"], ["is not a multiple of 4"]),
        (["cluster.nodes=1,3", "parallel.tp=2"], ["can't be shared", "in:      cluster.nodes=1"]),
        (["cluster.nodes=1,5,two"], ["cluster.nodes = two", "partition debug has 4 nodes"]),
        (["cluster.nodes=1,0"], ["too small"]),
        (["parallel.tp=1,0"], ["parallel.tp = 0"]),
        (["cluster.partition=debug,low,hihg"], ["nearest: high"]),
        (["parallel=ddp,dpp"], ["parallel = dpp"]),
        (["data=synthetic,text", "data.paths=[nothing.txt]"], ["data.paths.0"]),
        (["cluster.nodes=1,5", "trainer.max_stps=1"], ["trainer.max_stps"]),
        (["quant.scheme=none,int3"], ["quant.scheme"]),
        (["cluster.nodes=1,5", "strict=true,false"], ["can't differ"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_still_refuses_the_whole(
    words: list[str], parts: list[str], slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, *words]) == 2
    out, err = capsys.readouterr()
    assert not out and "nothing was submitted" in err
    for part in parts:
        assert part in err, err
    assert not slurm.calls("sbatch") and not Path("runs").exists()


def test_the_exit_code_is_that_of_the_rest(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.set(refuse="sbatch: error: no")
    assert main([*NODES]) == 3


@pytest.mark.parametrize(
    ("changes", "impossible"),
    [
        ({"parallel__tp": 3}, True),
        ({"data__seq_len": 4096}, True),
        ({"optim__warmup_steps": 9}, True),
        ({"cluster__nodes": 2}, True),
        ({"parallel__tp": 0}, False),
        ({"parallel__tp": "three"}, False),
        ({"name": "a/b", "parallel__tp": 3}, False),
        ({"data__kind": "text", "data__paths": ["/no/*.txt"], "parallel__tp": 3}, False),
        ({"trainer__max_stps": 3, "parallel__tp": 3}, False),
    ],
)
def test_what_cannot_be_is_told_from_what_is_wrong(changes: dict[str, object], impossible: bool) -> None:
    checked = experiment.check(tiny_plain(**changes))
    assert checked.faults and checked.spec is None
    assert checked.impossible == impossible
    assert (checked.options is not None) == impossible


def test_what_is_right_is_not_impossible() -> None:
    checked = experiment.check(tiny_plain())
    assert not checked.impossible and checked.spec is not None


def test_an_array_by_hand_keeps_its_numbers() -> None:
    """A task of `sbatch --array` by hand has its point, whichever others can't be."""
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "1", "SLURM_ARRAY_JOB_ID": "40"}
    words = ["+experiment=pretrain_tiny", "trainer.global_batch_size=16,7,32"]
    file = by_hand.find(words, {**job, "SLURM_ARRAY_TASK_ID": "2"})
    assert file is not None
    run = RunDir(Path(file.read_text().strip()))
    assert load_yaml(run.spec_file)["trainer"]["global_batch_size"] == 32
    with pytest.raises(ConfigError, match=r"is not a multiple of 4(.|\n)*in: +trainer.global_batch_size=7"):
        by_hand.find(words, {**job, "SLURM_ARRAY_TASK_ID": "1"})


def test_an_array_has_one_shape(slurm: FakeSlurm) -> None:
    words = ["cluster.nodes=1,2", "cluster.processes_per_node=1,2", "seed=1,2", "trainer.micro_batch_size=1"]
    assert main([*TINY, *words]) == 0
    scripts = [call["script"] for call in slurm.calls("sbatch")]
    assert len(scripts) == 4 and all("--array=0-1%" in script for script in scripts)
    shapes = {
        tuple(line for line in text.splitlines() if "--nodes" in line or "--cpus" in line) for text in scripts
    }
    assert len(shapes) == 4


# --- conf/experiment/sweep_parallelism.yaml

PARALLELISM = ("+experiment=sweep_parallelism", "parsable=true")


def test_every_strategy_on_every_shape(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", *PARALLELISM]) == 0
    out, err = capsys.readouterr()
    assert not err, "every point of the file as it stands can be"
    specs = [load_yaml(Path(line.split("\t")[2]) / "spec.yaml") for line in out.splitlines()]
    strategies = {spec["parallel"]["name"] for spec in specs}
    assert strategies >= {"ddp", "fsdp", "hsdp", "tp", "pp", "cp"}
    shapes = {(spec["cluster"]["nodes"], spec["cluster"]["processes_per_node"]) for spec in specs}
    assert shapes == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert len(specs) == len(strategies) * len(shapes)
    last = len(strategies) - 1
    scripts = [call["script"] for call in slurm.calls("sbatch")]
    assert len(scripts) == 4 and all(f"--array=0-{last}%1\n" in script for script in scripts)
    pairs = [s for s in specs if s["cluster"]["processes_per_node"] == 2 and s["parallel"]["name"] == "tp"]
    assert [spec["parallel"]["tp"] for spec in pairs] == [2, 2], (
        "a strategy's own interpolation sees the point's processes"
    )


def test_ones_own_choice_goes_before_the_files(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cluster=slurm", "cluster.nodes=1", "parallel=fsdp", "parallel.tp=1,2,4"]
    assert main(["-m", *PARALLELISM, *words]) == 0
    out, err = capsys.readouterr()
    specs = [load_yaml(Path(line.split("\t")[2]) / "spec.yaml") for line in out.splitlines()]
    found = {(s["cluster"]["processes_per_node"], s["parallel"]["tp"]) for s in specs}
    assert found == {(1, 1), (2, 1), (2, 2)}
    assert [line.split(":")[0] for line in err.splitlines()] == ["refused"] * 3


def test_without_a_sweep_it_is_one_sensible_run(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PARALLELISM]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    spec = load_yaml(Path(line.split("\t")[2]) / "spec.yaml")
    assert (spec["parallel"]["name"], spec["cluster"]["kind"]) == ("ddp", "slurm")
    assert (spec["cluster"]["nodes"], spec["cluster"]["processes_per_node"]) == (1, 2)
