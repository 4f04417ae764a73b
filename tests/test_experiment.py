from __future__ import annotations

import dataclasses
import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from hpcdl import experiment
from hpcdl.errors import ConfigError, Fault
from hpcdl.experiment import sections, words
from hpcdl.spec import ClusterSpec, ExperimentSpec, LaunchOptions, ModelSpec
from hpcdl.spec.plain import to_plain
from tests.factory import tiny_plain, tiny_spec


def faults(**dotted: Any) -> dict[str, Fault]:
    """Faults of the tiny experiment with these changes, by key."""
    return {fault.key: fault for fault in experiment.check(tiny_plain(**dotted)).faults}


def test_a_right_config_becomes_the_spec() -> None:
    spec, options = experiment.load({**tiny_plain(), "runs_dir": "elsewhere", "wait": True})
    assert spec == tiny_spec()
    assert options == LaunchOptions(runs_dir="elsewhere", wait=True)


def test_whole_numbers_do_for_numbers_and_for_text() -> None:
    spec, _ = experiment.load(tiny_plain(optim__lr=1, cluster__account=1234, cluster__env={"A": 4}))
    assert (spec.optim.lr, spec.cluster.account, spec.cluster.env) == (1.0, "1234", {"A": "4"})


def test_all_faults_come_at_once_each_with_its_fix() -> None:
    found = faults(
        trainer__max_steps="ten",
        trainer__log_every=True,
        trainer__keep_last=1.5,
        data__seq_len=1e3,
        optim__schedule="cosin",
        optim__betas=[0.9],
        cluster__setup="module load cuda",
        trainer__precisoin="bf16",
        trainer__lr=1,
        modle={"name": "x"},
        peft__name="lroa",
        model__shape__hidden_size=None,
        model__tokenizer="Byte",
        data__packing="yes",
        data__split=2,
        name=True,
    )
    expected = {
        "trainer.max_steps": ("whole number", "trainer.max_steps="),
        "trainer.log_every": ("whole number", "trainer.log_every=1"),
        "trainer.keep_last": ("whole number", "trainer.keep_last=2"),
        "data.seq_len": ("whole number", "data.seq_len=1000"),
        "optim.schedule": ("choices", "optim.schedule=cosine"),
        "optim.betas.1": ("missing", "+optim.betas.1="),
        "cluster.setup": ("not a list", "'cluster.setup=[module load cuda]'"),
        "trainer.precisoin": ("no such key", "trainer.precision=bf16"),
        "trainer.lr": ("no such key", "optim.lr=1"),
        "modle": ("no such key", "model="),
        "peft.name": ("no such method", "peft=lora"),
        "model.shape.hidden_size": ("null", "model.shape.hidden_size=8"),
        "model.tokenizer": ("choices", "model.tokenizer=byte"),
        "data.packing": ("true nor false", "data.packing=true"),
        "data.split": ("too large", "data.split=0.05"),
        "name": ("not text", "name="),
    }
    assert found.keys() == expected.keys()
    for key, (problem, fix) in expected.items():
        assert problem in found[key].problem, found[key]
        assert fix in found[key].fix, found[key]


def test_a_section_that_is_missing_or_no_section() -> None:
    plain = tiny_plain(quant="int8")
    del plain["optim"], plain["trainer"]["max_steps"]
    found = {fault.key: fault for fault in experiment.check(plain).faults}
    assert found.keys() == {"quant", "optim", "trainer.max_steps"}
    assert "group of keys" in found["quant"].problem
    assert found["optim"].problem == "is missing"
    assert found["trainer.max_steps"].allowed == "a whole number of at least 1"


RULES: list[tuple[str, dict[str, Any], str, str]] = [
    ("name", {"name": "a/b"}, "safe", "name=a_b"),
    ("name", {"name": "latest"}, "safe", "name=my_run"),
    ("name", {"name": ""}, "safe", "name=my_run"),
    ("name", {"name": "ünï"}, "safe", "name=n"),
    ("runs_dir", {"runs_dir": "a\nb"}, "folder", "runs_dir=runs"),
    ("model", {"model__shape": None}, "no weights", "model.path="),
    ("train", {"train": "full", "peft__name": "lora"}, "trains every weight", "peft=none"),
    ("offload.name", {"offload__name": "stream", "trainer__compile": True}, "trainer.compile=true", "=false"),
    ("model.shape.num_attention_heads", {"model__shape__num_attention_heads": 5}, "divide", "=4"),
    ("model.shape.num_key_value_heads", {"model__shape__num_key_value_heads": 3}, "divide", "=2"),
    ("model.shape.head_dim", {"model__shape__head_dim": 7}, "even", "head_dim=8"),
    ("model.shape.vocab_size", {"model__shape__vocab_size": 256}, "byte tokenizer", "=260"),
    ("model.tokenizer", {"model__tokenizer": "auto"}, "random", "model.tokenizer=byte"),
    ("model.path", {"model__path": "/no/such/model"}, "no such folder", "model.path="),
    ("data.seq_len", {"data__seq_len": 4096}, "longer", "data.seq_len=128"),
    ("data.paths", {"data__kind": "text"}, "at least one file", "data.paths=["),
    ("data.paths.0", {"data__kind": "text", "data__paths": ["/no/*.txt"]}, "no file", "data.paths=["),
    ("data.dataset", {"data__kind": "hf"}, "needs a dataset", "data.dataset="),
    ("task.name", {"task__name": "sft"}, "no answers", "data=jsonl"),
    ("quant.scheme", {"quant__scheme": "nf5"}, "no such scheme", "quant=nf4"),
    (
        "trainer.activation_offload",
        {"trainer__activation_offload": "disk"},
        "recompute",
        "trainer.activation_checkpointing=full",
    ),
    (
        "trainer.activation_offload",
        {"trainer__activation_checkpointing": "full", "trainer__activation_offload": "host"},
        "host's memory already",
        "trainer.activation_offload=disk",
    ),
    ("trainer.keep_best", {"trainer__keep_best": 1}, "isn't known", "trainer.keep_best=0"),
    (
        "trainer.keep_best",
        {"trainer__keep_best": 1, "trainer__checkpoint_every": 4, "trainer__eval_every": 3},
        "eval_every=3, checkpoint_every=4",
        "trainer.eval_every=4 trainer.checkpoint_every=4",
    ),
    ("quant.scheme", {"quant__scheme": "nf4"}, "can't take updates", "peft=lora"),
    ("quant.scheme", {"quant__scheme": "int8"}, "can't take updates", "peft=lora"),
    ("quant.scheme", {"quant__scheme": "int4", "peft__name": "lora"}, "no multiple of 64", "quant=none"),
    ("quant.qat", {"quant": {"scheme": "int8", "qat": True}, "peft__name": "lora"}, "freezes", "peft=none"),
    (
        "quant.head",
        {"quant": {"scheme": "int8", "qat": True, "head": "int8"}},
        "trains it",
        "quant.head=none",
    ),
    ("optim.warmup_steps", {"optim__warmup_steps": 7}, "not end", "optim.warmup_steps=1"),
    ("parallel.dp_replicate", {"parallel__dp_replicate": 3}, "product is 3", "dp_replicate=-1"),
    ("parallel.dp_replicate", {"parallel__dp_replicate": 0}, "at least 1", "dp_replicate=1"),
    ("parallel.dp_shard", {"parallel__dp_shard": -1}, "only one degree", "dp_shard=1"),
    ("cluster.processes_per_node", {"parallel__tp": 2}, "can't be shared", "processes_per_node=2"),
    (
        "parallel.tp",
        {"parallel__tp": 4, "cluster__processes_per_node": 4},
        "key_value_heads 2",
        "parallel.tp=2",
    ),
    (
        "parallel.dp_shard",
        {"parallel__dp_shard": 2, "cluster__processes_per_node": 2},
        "ddp",
        "parallel=hsdp",
    ),
    (
        "parallel.cp",
        {"parallel__cp": 3, "cluster__processes_per_node": 3},
        "data.seq_len 32",
        "parallel.cp=2",
    ),
    ("trainer.global_batch_size", {"trainer__global_batch_size": 7}, "multiple of 2", "=8"),
    ("peft.rank", {"peft": {"name": "lora", "rank": 64}}, "width", "peft.rank=16"),
    ("peft.targets", {"peft": {"name": "lora", "targets": []}}, "target", "all-linear"),
    ("cluster.nodes", {"cluster__nodes": 2}, "this machine", "cluster.nodes=1"),
    ("cluster.processes_per_node", {"cluster__gpus_per_node": 2}, "each process has one", "per_node=2"),
    ("cluster.signal", {"cluster__signal": "B:USR2@60"}, "leave out B:", "USR2@120"),
    ("cluster.signal", {"cluster__signal": "USR1"}, "not a signal", "USR2@120"),
    ("cluster.signal", {"cluster__signal": "USR2@120", "cluster__time_min": 2}, "before", "USR2@30"),
    ("cluster.gres", {"cluster__gres": "gpu 2"}, "--gres", "gpu:1"),
    ("cluster.partition", {"cluster__partition": "a b"}, "single word", "partition=null"),
    ("cluster.extra.0", {"cluster__extra": ["--array=0-9"]}, "key of its own", "array_parallelism"),
    ("cluster.extra.0", {"cluster__extra": ["-N 2"]}, "key of its own", "cluster.nodes"),
    ("cluster.extra.0", {"cluster__extra": ["--output=x"]}, "hpcdl sets", "leave it out"),
    ("cluster.extra.0", {"cluster__extra": ["mail"]}, "no option", "[--mail]"),
    ("cluster.setup.1", {"cluster__setup": ["a", "b\nc"]}, "line break", "item of its own"),
    ("cluster.env.A-B", {"cluster__env": {"A-B": "1"}}, "environment variable", "A_B=1"),
    ("cluster.python", {"cluster__python": " "}, "Python", "cluster.python=null"),
]


@pytest.mark.parametrize(("key", "changes", "problem", "fix"), RULES)
def test_each_rule(key: str, changes: dict[str, Any], problem: str, fix: str) -> None:
    found = faults(**changes)
    assert key in found, found
    assert problem in found[key].problem
    assert fix in found[key].fix


def site(**cluster: Any) -> dict[str, Any]:
    limits = {"nodes": 4, "cpus_per_node": 8, "mem_gb": 16, "gpus_per_node": 2, "time_min": 60}
    return {"cluster": {"kind": "slurm", "partitions": {"gpu": limits, "cpu": {}}, **cluster}}


@pytest.mark.parametrize(
    ("key", "cluster", "problem", "fix"),
    [
        ("partition", {"partition": "gpuu"}, "no partition gpuu", "cluster.partition=gpu"),
        ("nodes", {"partition": "gpu", "nodes": 5}, "has 4 nodes", "cluster.nodes=4"),
        ("cpus_per_process", {"partition": "gpu", "cpus_per_process": 9}, "8 CPUs", "=8"),
        ("processes_per_node", {"partition": "gpu", "processes_per_node": 16}, "8 CPUs", "=8"),
        ("mem_gb", {"partition": "gpu", "mem_gb": 17.5}, "16 GiB", "cluster.mem_gb=16"),
        ("gpus_per_node", {"partition": "gpu", "gpus_per_node": 3, "processes_per_node": 3}, "2 GPUs", "=2"),
        ("gres", {"partition": "gpu", "gres": "gpu:a100:3"}, "2 GPUs", "cluster.gres=gpu:a100:2"),
        ("gres", {"gres": "gpu:1", "gpus_per_node": 1}, "second time", "cluster.gres=null"),
        ("time_min", {"partition": "gpu", "time_min": 61}, "60 minutes", "cluster.time_min=60"),
    ],
)
def test_what_the_partition_does_not_have(key: str, cluster: dict[str, Any], problem: str, fix: str) -> None:
    found = faults(**site(**cluster), trainer__global_batch_size=480)
    assert problem in found[f"cluster.{key}"].problem, found
    assert fix in found[f"cluster.{key}"].fix


def test_a_partition_without_limits_takes_anything() -> None:
    assert not faults(**site(partition="cpu", nodes=100), trainer__global_batch_size=800)


def leaves(cls: type, prefix: str = "") -> list[str]:
    """Dotted keys of all fields of a dataclass."""
    found = []
    for name, hint in words.hints(cls).items():
        inner = [m for m in words.parts_of(hint)[0] if dataclasses.is_dataclass(m)]
        found += [f"{prefix}{name}"] + [k for m in inner for k in leaves(m, f"{prefix}{name}.")]  # type: ignore[arg-type]
    return found


WEIRD: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**30, -1e300, 1e400, float("nan"), "", "x", "ünï ☃", "a\nb", "'\"", [], [1], [None],
    [[]], {}, {"x": 1}, {"x": None}, {"": {}}, {"x": {"y": [1]}},
)  # fmt: skip


@pytest.mark.parametrize("key", leaves(ExperimentSpec))
def test_no_value_brings_it_down(key: str) -> None:
    for value in WEIRD:
        checked = experiment.check(tiny_plain(**{key.replace(".", "__"): value}))
        text = str(ConfigError(checked.faults))
        assert "pydantic" not in text and "Input should" not in text and "http" not in text
        assert all(fault.problem and fault.key for fault in checked.faults)
        if checked.spec is not None:  # what is accepted can be written down and has an id
            json.dumps(to_plain(checked.spec))
            assert re.fullmatch(r"[0-9a-f]{12}", experiment.digest(checked.spec))


def test_faults_of_a_sweep_are_told_once() -> None:
    points = [(f"trainer.max_steps={n}", tiny_plain(trainer__max_steps=n, data__split=7)) for n in (0, 3, -1)]
    with pytest.raises(ConfigError) as error:
        experiment.load_all(points)
    by_value = {(fault.key, fault.value): fault.where for fault in error.value.faults}
    assert by_value == {
        ("data.split", "7"): "all 3 points of the sweep",
        ("trainer.max_steps", "0"): "trainer.max_steps=0",
        ("trainer.max_steps", "-1"): "trainer.max_steps=-1",
    }


def test_the_run_id_leaves_out_what_changes_no_result() -> None:
    base = experiment.digest(tiny_spec())
    same = {
        "cluster__partition": "gpu", "cluster__account": "a", "cluster__time_min": 5, "cluster__mem_gb": 2.5,
        "cluster__setup": ["x"], "cluster__max_requeues": 1, "tracker__name": "wandb", "monitor__every_s": 1.0,
        "cluster__signal": None, "cluster__python": "/p",
    }  # fmt: skip
    for key, value in same.items():
        assert experiment.digest(tiny_spec(**{key: value})) == base, key
    others = {
        "cluster__nodes": 2, "cluster__kind": "slurm", "cluster__processes_per_node": 2, "seed": 1, "name": "b",
        "optim__lr": 0.5, "cluster__env": {"A": "1"}, "cluster__gpus_per_node": 1, "data__seq_len": 16,
    }  # fmt: skip
    ids = {experiment.digest(tiny_spec(**{key: value})) for key, value in others.items()}
    assert len(ids) == len(others) and base not in ids


def test_a_new_cluster_key_must_be_decided_on() -> None:
    """Whoever adds a key to the cluster section says whether it changes the result."""
    kept = {
        *("kind", "nodes", "processes_per_node", "cpus_per_process", "gpus_per_node", "gres", "env"),
    }
    left_out = set(experiment.identity.LEFT_OUT["cluster"])  # type: ignore[attr-defined]
    assert {f.name for f in dataclasses.fields(ClusterSpec)} == kept | left_out


def test_paths_do_not_depend_on_where_it_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("text")
    ids = set()
    for folder, path in (
        (tmp_path, "a.txt"),
        (tmp_path / "deep", "../a.txt"),
        (tmp_path, f"{tmp_path}/a.txt"),
    ):
        monkeypatch.chdir(folder)
        spec, _ = experiment.load(tiny_plain(data__kind="text", data__paths=[path]))
        assert Path(spec.data.paths[0]).is_absolute()
        ids.add(experiment.digest(spec))
    assert len(ids) == 1


def model_folder(folder: Path, **changes: Any) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300, "max_position_embeddings": 64,
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}, **changes,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_shape_is_read_from_the_models_config(tmp_path: Path) -> None:
    spec, _ = experiment.load(tiny_plain(model__path=str(model_folder(tmp_path / "m"))))
    shape = spec.model.shape
    assert shape is not None
    assert (shape.hidden_size, shape.num_key_value_heads, shape.rope_theta) == (64, 4, 5e5)
    assert shape.rope_scaling == {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    too_long = faults(model__path=str(tmp_path / "m"), data__seq_len=128)
    assert "64" in too_long["data.seq_len"].problem


def test_a_model_that_is_no_llama_has_no_shape(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text('{"n_embd": 768, "n_layer": 12}')
    spec, _ = experiment.load(tiny_plain(model__path=str(folder), model__tokenizer="auto"))
    assert spec.model.shape is None


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    (tmp_path / "modell").mkdir()
    assert "no config.json" in faults(model__path=str(tmp_path / "modell"))["model.path"].problem
    near = faults(model__path=str(tmp_path / "model"))["model.path"]
    assert near.nearest == str(tmp_path / "modell")
    (tmp_path / "modell" / "config.json").write_text("{")
    assert "not JSON" in faults(model__path=str(tmp_path / "modell"))["model.path"].problem


def test_weights_from_the_hub_drop_a_packages_shape() -> None:
    spec, _ = experiment.load(tiny_plain(model__hub_id="a/b", model__package="p", model__tokenizer="auto"))
    assert spec.model.shape is None


def test_every_type_of_the_spec_has_words() -> None:
    def all_hints(cls: type) -> list[Any]:
        own = list(typing.get_type_hints(cls, include_extras=True).values())
        inner = [h for h in own for m in words.parts_of(h)[0] if dataclasses.is_dataclass(m)]
        return own + [h for i in inner for m in words.parts_of(i)[0] for h in all_hints(m)]

    for hint in all_hints(ExperimentSpec) + all_hints(LaunchOptions):
        assert words.allowed(hint)


def test_type_of_finds_a_strategys_own_keys() -> None:
    assert sections.type_of("peft.rank") is not None
    assert sections.type_of("parallel.bucket_cap_mb") is not None
    assert sections.type_of("cluster.env.ANY") is str
    assert sections.type_of("model.shape.hidden_size") is not None
    assert sections.type_of("trainer.no") is None and sections.type_of("no.such") is None


def test_model_source_order() -> None:
    assert ModelSpec(name="m", path="/a", hub_id="b", package="c").source == "path"
