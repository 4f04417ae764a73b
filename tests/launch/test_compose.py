from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from hpcdl.experiment import sections, words
from hpcdl.launch import sweep
from hpcdl.launch.compose import Composer, config_folder


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer()


@pytest.fixture(scope="module")
def hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        yield


def by_hydra(overrides: list[str]) -> Any:
    return OmegaConf.to_container(compose("config", overrides), resolve=True)


def ours(composer: Composer, overrides: list[str]) -> Any:
    parsed, faults = composer.parse(overrides)
    composed = composer.compose(parsed)
    assert not faults and not composed.faults, (faults, composed.faults)
    return composed.plain


EQUAL: tuple[list[str], ...] = (
    [],
    ["+experiment=lora_llama"],
    ["+experiment=lora_llama", "cluster=slurm_docker", "parallel=ddp", "optim=sgd", "trainer=smoke"],
    ["cluster=site_example", "model=llama3_8b", "tracker=wandb", "monitor=none", "task=sft", "data=hf"],
    ["trainer.max_steps=3", "optim.lr=1e-5", "seed=7"],
    ["optim.lr=1", "optim.lr=2"],
    ["trainer.max_grad_norm=null", "data.packing=false", "cluster.partition=gpu"],
    ["optim.betas=[0.8,0.9]", "data.paths=[a,b,'c d']", "tracker.tags=[x]"],
    ["peft=lora", "peft.targets=[q_proj,v_proj]", "peft.alpha=8"],
    ["model.shape.rope_scaling={rope_type:linear,factor:2.0}"],
    ["model={name:other}", "model.shape.hidden_size=256"],
    ["++cluster.env.OMP_NUM_THREADS='4'", "+cluster.env.A=b"],
    ["+new=1", "+deep.new.key=[1,{a:2}]", "++seed=3"],
    ["~tracker.tags", "~monitor"],
    ["~model.shape"],
    ["name=${model.name}-${data.kind}", "seed=${trainer.max_steps}"],
    ["data.seq_len=${model.shape.max_position_embeddings}", "model.shape.max_position_embeddings=64"],
    ["name=${oc.env:NO_SUCH_VARIABLE,there}", "trainer.eval_every=${trainer.max_steps}", "trainer.max_steps=5"],
    ["name='a b'", "task.sample_prompt='x: y, z=[1]'", "task.sample_prompt=\"it's\""],
    ["task.sample_prompt='ünï☃'", "task.sample_prompt="],
    ["runs_dir=/tmp/x", "dry_run=true", "after=null", "wait=yes"],
    ["model.path=/a/b-c_d.e", "model.hub_id=org/name-1.5B", "model.revision=abc123"],
    ["optim.lr=inf", "optim.eps=1_000", "optim.weight_decay=-.5e-3"],
    ["+model@other=llama3_1b"],
    ["data.kind=null", "cluster.extra=['--mail-type=END','-x c1']", "cluster.setup=['module load a b']"],
)  # fmt: skip


@pytest.mark.parametrize("overrides", EQUAL, ids=" ".join)
@pytest.mark.filterwarnings("ignore")
def test_the_result_is_hydras(composer: Composer, hydra: None, overrides: list[str]) -> None:
    assert ours(composer, overrides) == by_hydra(overrides)


def test_random_values_in_random_order(composer: Composer, hydra: None) -> None:
    """Fixed seed; each set mixes plain values, which take the quick way, with ones that need OmegaConf."""
    dice = random.Random(0)
    keys = ["trainer.max_steps", "optim.lr", "data.packing", "model.shape.vocab_size", "trainer.keep_last"]
    values = ["1", "2.5", "true", "null", "abc", "[1,2]", "'q'", "-3", "1e-3", "${seed}", "{a:1}"]
    for _ in range(25):
        overrides = [f"{dice.choice(keys)}={dice.choice(values)}" for _ in range(dice.randint(1, 5))]
        overrides += dice.choice([[], ["model=smollm2_135m"], ["+experiment=pretrain_tiny"]])
        dice.shuffle(overrides)
        assert ours(composer, overrides) == by_hydra(overrides), overrides


def test_a_later_composition_does_not_see_an_earlier_one(composer: Composer) -> None:
    before = ours(composer, ["model=llama_tiny"])
    ours(composer, ["optim.lr=0.5", "trainer.max_steps=1", "+cluster.env.A=1"])
    assert ours(composer, ["model=llama_tiny"]) == before


SWEEPS: tuple[list[str], ...] = (
    ["optim.lr=1e-3,2e-3", "seed=1,2,3"],
    ["optim.lr=choice(0.1,0.2)", "trainer.max_steps=range(1,6,2)", "+experiment=pretrain_tiny"],
    ["model=llama_tiny,smollm2_135m", "data.seq_len=64,128"],
    ["model=glob(llama3*)", "name=a"],
    ["+experiment=pretrain_tiny,lora_llama", "seed=5,6"],
    ["optim.betas=[0.9,0.95],[0.8,0.9]", "name='a b','c,d'"],
    ["optim.lr=range(0.1,0.4,0.1)", "data.packing=true,false", "cluster.partition=null,gpu"],
    ["seed=1,2", "seed=3,4", "name=x", "name=y"],
    ["++cluster.env={A:x},{B:y}", "optim.lr=sort(3,1,2)"],
)


@pytest.mark.parametrize("overrides", SWEEPS, ids=" ".join)
def test_the_points_are_hydras(composer: Composer, hydra: None, overrides: list[str]) -> None:
    parsed, faults = composer.parse(overrides)
    assert not faults
    expected = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
    points = sweep.expand(parsed)
    assert [[str(o.input_line) for o in point] for point in points] == [
        [
            line if (p := composer.parse([line])[0][0]).is_sweep_override() else str(p.input_line)
            for line in lines
        ]
        for lines in expected
    ]
    for point, lines in zip(points, expected, strict=True):
        assert composer.compose(point).plain == by_hydra(list(lines))


def test_files_are_read_once_for_each_choice_of_groups(
    composer: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = Composer()
    reads: list[list[str]] = []
    read = Composer._without_hydra

    def counting(composer: Composer, lines: list[str]) -> Any:
        reads.append(lines)
        return read(composer, lines)

    monkeypatch.setattr(Composer, "_without_hydra", counting)
    parsed, _ = fresh.parse(["model=llama_tiny,smollm2_135m", "seed=range(0,50)", "tracker=none"])
    for point in sweep.expand(parsed):
        fresh.compose(point)
    assert reads == [["model=llama_tiny", "tracker=none"], ["model=smollm2_135m", "tracker=none"]]


def test_a_job_id_keeps_its_spelling(composer: Composer) -> None:
    assert ours(composer, ["after=123_4"])["after"] == "123_4"
    assert ours(composer, ["after=123"])["after"] == "123"
    assert ours(composer, ["name=1e3"])["name"] == "1e3"


def test_keys_that_a_users_file_leaves_out_need_no_plus(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "bare.yaml").write_text("kind: slurm\n")
    composer = Composer(config_dir=str(tmp_path))
    plain = ours(composer, ["cluster=bare", "cluster.nodes=2", "cluster.env.A=b"])
    assert plain["cluster"] == {"kind": "slurm", "nodes": 2, "env": {"A": "b"}}
    spelled = composer.spelled_out(["cluster=bare", "cluster.nodes=2", "cluster.nodes=3", "seed=1"])
    assert spelled == ["cluster=bare", "++cluster.nodes=2", "cluster.nodes=3", "seed=1"]


def test_a_group_of_new_variables_needs_no_plus(composer: Composer) -> None:
    assert ours(composer, ["cluster.env={A:x}", "cluster.env.B=y"])["cluster"]["env"] == {"A": "x", "B": "y"}


def options() -> list[tuple[str, str]]:
    return [
        (folder.name, file.stem)
        for folder in sorted(config_folder().iterdir())
        if folder.is_dir() and folder.name != "experiment"
        for file in sorted(folder.glob("*.yaml"))
    ]


@pytest.mark.parametrize(("group", "option"), options())
def test_every_file_of_a_group_has_every_key(composer: Composer, group: str, option: str) -> None:
    """A student sees in the file what there is to change; and --cfg shows it."""
    section = ours(composer, [f"{group}={option}"])[group]
    hint = sections.top_level()[group]
    if hint in sections.FOUND_BY_NAME:
        hint = sections.FOUND_BY_NAME[hint].get(section[sections.NAMED_BY.get(hint, "name")]).Config
    assert set(section) == set(words.hints(hint))


@pytest.mark.parametrize(
    "file", sorted(config_folder().rglob("*.yaml")), ids=lambda f: f"{f.parent.name}/{f.name}"
)
def test_every_file_says_what_it_is_for(file: Path) -> None:
    assert file.read_text(encoding="utf-8").startswith("#")


def test_nothing_of_hydras_is_printed(composer: Composer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(Composer(), ["+experiment=lora_llama", "cluster=slurm_docker"])
