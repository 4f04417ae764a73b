"""The planner's search: what it chooses is a config that launch takes, fits, and is explained."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hpcdl import experiment
from hpcdl.plan import found as words
from hpcdl.plan import search_space, search_told, search_view
from hpcdl.plan.found import Found
from hpcdl.plan.records import Device, Hardware, Links
from hpcdl.plan.search import search
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.plain import to_plain
from tests.factory import tiny_spec

GIB = 2**30
SHAPES: dict[str, dict[str, Any]] = {
    "405b": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
}
LORA = {"peft": {"name": "lora", "targets": ["all-linear"]}}


def gpus(nodes: int, each: int, gib: float = 80) -> Hardware:
    """Nodes with so many H100s, or with less memory."""
    device = Device(
        name="H100",
        kind="cuda",
        memory_bytes=int(gib * GIB),
        peak_flops={"bf16": 989e12, "fp32": 67e12},
        efficiency={"bf16": 0.6, "fp32": 0.7},
        memory_bytes_per_s=2.8e12,
    )
    links = Links(
        inside_bytes_per_s=3e11, between_bytes_per_s=4e10, inside_latency_s=1e-5, between_latency_s=2e-5
    )
    return Hardware(device=device, links=links, ranks_per_node=each, nodes=nodes)


def large(model: str, nodes: int, each: int, **more: Any) -> ExperimentSpec:
    values = {
        "model": {"name": model, "tokenizer": "byte", "shape": SHAPES[model]},
        "data__seq_len": 8192,
        "trainer__precision": "bf16",
        "trainer__global_batch_size": 512,
        "trainer__micro_batch_size": 1,
        "cluster": {"kind": "slurm", "nodes": nodes, "processes_per_node": each, "gpus_per_node": each},
        "parallel": {"name": "auto"},
        **more,
    }
    return tiny_spec(**values)


def accepted(spec: ExperimentSpec) -> None:
    """By the very check that a launch makes."""
    checked = experiment.check(to_plain(spec))
    assert checked.spec == spec, checked.faults


@pytest.fixture(scope="module")
def of_405b() -> Found:
    return search(large("405b", 64, 8), gpus(64, 8))


def test_405b_on_512_gpus(of_405b: Found) -> None:
    chosen = of_405b.chosen
    assert chosen is not None and chosen.fits
    assert chosen.choice.tp in (1, 2, 4, 8), "tensor parallel stays inside a node"
    assert chosen.peak_bytes <= 0.9 * 80 * GIB
    assert chosen.spec.cluster.world_size == 512 and len(chosen.choice.degrees) >= 2
    assert of_405b.looked_at < of_405b.possible / 5, "most are left out unseen"
    accepted(chosen.spec)


def test_runners_up_are_other_meshes_and_say_why(of_405b: Found) -> None:
    assert len(of_405b.runners_up) >= 3
    assert of_405b.chosen is not None
    meshes = [of_405b.chosen.choice.mesh, *(lost.judged.choice.mesh for lost in of_405b.runners_up)]
    assert len(set(meshes)) == len(meshes)
    for lost in of_405b.runners_up:
        assert ("too large" in lost.why) == (not lost.judged.fits)
        accepted(lost.judged.spec)


def test_the_front_falls(of_405b: Found) -> None:
    front = of_405b.front
    assert len(front) >= 2
    for quick, lean in itertools.pairwise(front):
        assert quick.step_s < lean.step_s and quick.peak_bytes > lean.peak_bytes
    everything = (*front, *of_405b.others)
    for one in front:
        assert one.fits
        assert not any(
            other.fits and other.step_s < one.step_s and other.peak_bytes < one.peak_bytes
            for other in everything
        )


def test_a_small_model_on_one_node_is_copied() -> None:
    spec = large("8b", 1, 8)
    small = dataclasses.replace(spec, model=tiny_spec().model, data=tiny_spec().data)
    chosen = search(small, gpus(1, 8)).chosen
    assert chosen is not None
    assert chosen.choice.strategy == "ddp" and chosen.choice.checkpointing == "none"


def test_of_two_that_are_about_as_quick_the_simpler_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What predictions can't tell apart: fewer dimensions win."""
    spec, hardware = large("8b", 2, 8, trainer__global_batch_size=32), gpus(2, 8)
    monkeypatch.setattr(search_told, "EQUAL", 0.0)
    quickest = search(spec, hardware).chosen
    monkeypatch.setattr(search_told, "EQUAL", 10.0)
    found = search(spec, hardware)
    assert quickest is not None and found.chosen is not None
    assert quickest.choice.effort > found.chosen.choice.effort == (1, 0, 0, 0, 0)
    assert any("quicker, and less simple" in reason for reason in found.reasons)


def test_8b_with_lora_on_one_small_gpu_recomputes() -> None:
    spec = large("8b", 1, 1, data__seq_len=2048, trainer__global_batch_size=8, **LORA)
    found = search(spec, gpus(1, 1, gib=24), allow=("micro_batch_size", "checkpointing"))
    assert found.chosen is not None
    assert found.chosen.choice.checkpointing != "none" and found.chosen.choice.quant == "none"
    accepted(found.chosen.spec)
    without = [lost for lost in found.changes if lost.judged.choice.checkpointing == "none"]
    assert without and "too large" in without[0].why


def test_quantization_only_where_it_is_allowed() -> None:
    spec = large("8b", 1, 1, data__seq_len=2048, trainer__global_batch_size=8, **LORA)
    hardware = gpus(1, 1, gib=12)
    refused = search(spec, hardware)
    assert refused.chosen is None and refused.nearest is not None and refused.nearest.over_bytes > 0
    assert any("quantization" in remedy for remedy in refused.remedies)
    found = search(spec, hardware, allow=("micro_batch_size", "checkpointing", "offload", "quantization"))
    assert found.chosen is not None and found.chosen.choice.quant != "none"
    accepted(found.chosen.spec)


def test_what_is_typed_stays() -> None:
    spec = large("8b", 1, 8, trainer__micro_batch_size=2, trainer__activation_checkpointing="selective")
    keep = ("trainer.micro_batch_size", "trainer.activation_checkpointing")
    chosen = search(spec, gpus(1, 8), keep=keep).chosen
    assert chosen is not None
    assert (chosen.choice.micro_batch_size, chosen.choice.checkpointing) == (2, "selective")


def test_a_degree_that_is_given_stays() -> None:
    spec = large("8b", 1, 8, parallel={"name": "auto", "tp": 4})
    chosen = search(spec, gpus(1, 8)).chosen
    assert chosen is not None and chosen.choice.tp == 4


def test_other_mathematics_only_by_name() -> None:
    spec = large("8b", 2, 8)
    names = {one.choice.strategy for one in _all(search(spec, gpus(2, 8)))}
    assert names <= {"ddp", "fsdp", "hsdp", "tp", "pp", "cp"}
    ways = search_space.space(spec, 8, gpus=True, allow=("local_sgd", "diloco"))
    assert [choice.strategy for choice in ways.off_the_mesh()] == ["local_sgd", "diloco"]


def _all(found: Found) -> list[words.Judged]:
    return [*found.front, *found.others]


def test_everything_that_was_worked_out_is_accepted() -> None:
    """On six processes, three layers and an odd batch: little divides evenly."""
    spec = tiny_spec(
        parallel={"name": "auto"},
        model__shape={**to_plain(tiny_spec().model.shape), "num_hidden_layers": 3},
        cluster={"kind": "slurm", "nodes": 2, "processes_per_node": 3},
        trainer__global_batch_size=12,
    )
    found = search(spec, gpus(2, 3))
    assert len(_all(found)) > 10
    for one in _all(found):
        accepted(one.spec)


def test_a_run_that_may_lose_nodes_leaves_a_degree_open() -> None:
    spec = large("8b", 4, 8, cluster__min_nodes=2, trainer__global_batch_size=96)
    chosen = search(spec, gpus(4, 8)).chosen
    assert chosen is not None
    assert -1 in (chosen.spec.parallel.dp_replicate, chosen.spec.parallel.dp_shard)
    accepted(chosen.spec)


def test_nothing_fits() -> None:
    found = search(large("405b", 1, 8, trainer__global_batch_size=8), gpus(1, 8))
    assert found.chosen is None
    assert "nothing fits into 72.0 GiB a process" in found.reasons[0]
    assert any(remedy.startswith("cluster.nodes=") for remedy in found.remedies)


def test_no_closed_form_no_choice() -> None:
    spec = large("8b", 1, 8)
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, shape=None, hub_id="a/b"))
    found = search(spec, gpus(1, 8))
    assert found.chosen is None and found.unknown


@pytest.mark.parametrize("width", [80, 160])
def test_the_table(of_405b: Found, width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    search_view.show(console, of_405b)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert of_405b.chosen is not None
    assert words.name(of_405b.chosen.choice) in text
    assert "slower" in text and "Beaten by none" in text and "parallel.tp=" in text
    assert max(map(len, text.splitlines())) <= width


def test_the_words_to_type_make_the_choice(of_405b: Found) -> None:
    assert of_405b.chosen is not None
    plain = to_plain(large("405b", 64, 8))
    for word in words.overrides(of_405b.chosen.choice):
        key, _, value = word.partition("=")
        if "." in key:
            section, leaf = key.split(".")
            plain[section][leaf] = {"true": True, "false": False}.get(
                value, int(value) if value.isdigit() else value
            )
        else:
            plain[key] = {"name": value}
    assert experiment.check(plain).spec == of_405b.chosen.spec


def test_json_and_picture(of_405b: Found, tmp_path: Path) -> None:
    shown = json.loads(json.dumps(of_405b.json()))
    assert shown["chosen"]["fits"] and shown["front"][0]["step_s"] <= shown["front"][-1]["step_s"]
    search_view.draw(of_405b, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
