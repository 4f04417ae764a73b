"""parallel=auto: a launch chooses, and what it writes and names is the chosen experiment."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from hpcdl.errors import ConfigError
from hpcdl.launch import sweep
from hpcdl.launch.__main__ import main
from hpcdl.launch.compose import Composer
from hpcdl.parallel import auto as strategy
from hpcdl.plan import found as words
from hpcdl.plan import search
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.plain import load_yaml
from tests.factory import tiny_spec
from tests.fake_slurm import FakeSlurm

TINY = (
    "+experiment=pretrain_tiny",
    "cluster=slurm_docker",
    "cluster.nodes=2",
    "cluster.processes_per_node=2",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*overrides: str, multirun: bool = False) -> sweep.Asked:
    return sweep.read(Composer(), [*TINY, *overrides], multirun=multirun)


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*overrides)
    return str(caught.value)


def test_the_choice_is_a_strategy_with_its_degrees() -> None:
    (point,) = read("parallel=auto").points
    parallel = point.spec.parallel
    assert parallel.name in ("ddp", "fsdp", "hsdp", "tp", "pp", "cp")
    assert parallel.dp_replicate * parallel.dp_shard * parallel.tp * parallel.pp * parallel.cp == 4
    assert point.found is not None and point.found.chosen is not None


def test_the_run_is_the_one_of_the_chosen_config() -> None:
    (point,) = read("parallel=auto").points
    assert point.found is not None and point.found.chosen is not None
    (by_hand,) = read(*words.overrides(point.found.chosen.choice)).points
    assert by_hand.run_id == point.run_id and by_hand.spec == point.spec
    assert by_hand.found is None


def test_a_dry_run_says_what_was_chosen_and_why(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "parallel=auto", "dry_run=true"]) == 0
    out, err = capsys.readouterr()
    assert "#SBATCH --nodes=2" in out
    assert "parallel=auto chose " in err and "the quickest of" in err and "a process" in err
    assert not Path("runs").exists()


def test_spec_yaml_shows_the_degrees_and_where_they_come_from(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "parallel=auto", "parsable=true"]) == 0
    run = Path(capsys.readouterr().out.split("\t")[2].strip())
    text = (run / "spec.yaml").read_text()
    assert text.startswith("# parallel=auto chose ")
    spec = load_yaml(run / "spec.yaml")
    assert spec["parallel"]["name"] != "auto" and "allow" not in spec["parallel"]
    assert all(spec["parallel"][name] >= 1 for name in ("dp_replicate", "dp_shard", "cp", "tp", "pp"))


def test_a_launch_tells_it_too(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "parallel=auto"]) == 0
    assert re.search(r"^chosen +\w", capsys.readouterr().out, re.MULTILINE)
    assert main([*TINY, "parallel=auto"]) == 0
    assert "nothing was submitted" in capsys.readouterr().out, "the same run is found again"


def test_in_a_sweep(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", *TINY, "parallel=auto,fsdp", "parsable=true"]) == 0
    runs = [Path(line.split("\t")[2]) for line in capsys.readouterr().out.splitlines()]
    specs = [load_yaml(run / "spec.yaml")["parallel"] for run in runs]
    assert len(runs) == 2 and specs[1]["dp_shard"] == -1 and specs[0]["dp_shard"] >= 1
    (record,) = Path("runs/.sweeps").iterdir()
    labels = [point["overrides"] for point in json.loads(record.read_text())["points"]]
    assert labels == ["parallel=auto", "parallel=fsdp"]


def test_points_that_differ_in_nothing_that_matters_are_searched_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[ExperimentSpec] = []
    real = search.search

    def counted(spec: ExperimentSpec, *rest: object, **more: object) -> object:
        asked.append(spec)
        return real(spec, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(search, "search", counted)
    points = read("parallel=auto", "optim.lr=1e-3,2e-3,4e-3", "seed=1,2", multirun=True).points
    assert len(points) == 6 and len(asked) == 1
    assert {(point.spec.optim.lr, point.spec.seed) for point in points} == {
        (lr, seed) for lr in (1e-3, 2e-3, 4e-3) for seed in (1, 2)
    }
    read("parallel=auto", "trainer.global_batch_size=16,32", multirun=True)
    assert len(asked) == 3


def typed(overrides: Sequence[str]) -> ExperimentSpec:
    return read("parallel=auto", *overrides).points[0].spec


def test_what_is_typed_stays() -> None:
    spec = typed(["trainer.micro_batch_size=2", "trainer.activation_checkpointing=full", "parallel.tp=2"])
    assert (spec.trainer.micro_batch_size, spec.trainer.activation_checkpointing) == (2, "full")
    assert spec.parallel.tp == 2
    assert (
        typed(["trainer.activation_checkpointing=selective"]).trainer.activation_checkpointing == "selective"
    )


def test_nothing_is_searched_that_is_not_allowed() -> None:
    spec = typed(["parallel.allow=[]"])
    assert spec.trainer == read().points[0].spec.trainer


def test_nothing_fits() -> None:
    text = refused("parallel=auto", "parallel.memory_gb=0.1")
    assert "1. parallel = auto" in text and "nothing fits into 92 MiB a process" in text
    assert "too large" in text and "fix:" in text


def test_one_point_of_a_sweep_does_not_fit(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", *TINY, "parallel=auto", "parallel.memory_gb=0.1,8", "dry_run=true"]) == 0
    assert "# refused: parallel.memory_gb=0.1: parallel = auto: nothing fits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "words_"),
    [
        ("parallel.tp=3", ("parallel.tp = 3", "does not divide the 4 processes")),
        ("parallel.tp=0", ("parallel.tp = 0",)),
        ("parallel.allow=[chekpointing]", ("parallel.allow.0", "checkpointing")),
        ("parallel.memory_share=2", ("parallel.memory_share", "at most 1")),
        (
            "trainer.global_batch_size=3 parallel.tp=1 parallel.cp=1 parallel.pp=1",
            ("parallel = auto", "3 sequences"),
        ),
        ("optim.warmup_steps=1000", ("optim.warmup_steps",)),
    ],
)
def test_faults(override: str, words_: Sequence[str]) -> None:
    text = refused("parallel=auto", *override.split())
    for word in words_:
        assert word in text, text


def test_a_model_of_unknown_shape() -> None:
    text = refused("parallel=auto", "model=custom", "model.hub_id=a/b", "model.tokenizer=auto")
    assert "parallel = auto" in text and "dimensions" in text


def test_a_spec_written_by_hand_is_told_so() -> None:
    with pytest.raises(ConfigError, match="hpcdl launch"):
        strategy.build(tiny_spec(parallel={"name": "auto"}).parallel, None, None, None)  # type: ignore[arg-type]
