"""LoRA's variants: what they compute, on one process and several, and adapters that others begin from."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpcdl import compress, experiment
from hpcdl.distributed import shards
from hpcdl.errors import HpcdlError
from hpcdl.worker import model as models
from tests.factory import tiny_plain, tiny_spec
from tests.worker.conftest import Finished, Workers

pytestmark = pytest.mark.torch

METHODS = ("lora", "rslora", "dora")


def adapted(name: str, **keys: Any) -> tuple[Any, nn.Module]:
    """A tiny Llama's first query matrix under a method with random A and B, and the whole model."""
    spec = tiny_spec(peft={"name": name, "rank": 4, "alpha": 6.0, **keys})
    assert spec.model.shape is not None
    torch.manual_seed(1)
    model = compress.get(name).apply(spec.peft, models.from_shape(spec.model.shape, "sdpa", 0))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer, model


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_computes(name: str) -> None:
    layer, model = adapted(name)
    weight, x = layer.base_layer.weight, torch.randn(3, 32)
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    together = weight + update * (6 / math.sqrt(4) if name == "rslora" else 6 / 4)
    if name == "dora":
        lengths = layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(lengths, weight.norm(dim=1))  # begins as W itself
        together = together * (lengths / together.norm(dim=1))[:, None]
    torch.testing.assert_close(layer(x), x @ together.T, rtol=1e-4, atol=1e-5)
    assert not weight.requires_grad
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", METHODS)
def test_memory_counts_what_is_trained(name: str) -> None:
    from hpcdl.spec.layout import matrices

    spec = tiny_spec(peft={"name": name, "rank": 4})
    assert spec.model.shape is not None
    model = compress.get(name).apply(spec.peft, models.from_shape(spec.model.shape, "sdpa", 0))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    told = [(m.count, compress.get(name).memory(spec.peft, m)) for m in matrices(spec.model.shape)]
    assert sum(count * beside.parameters for count, beside in told) == trained


# --- refused before submission ----------------------------------------------------------------------------


def faults(**dotted: Any) -> dict[str, Any]:
    return {fault.key: fault for fault in experiment.check(tiny_plain(**dotted)).faults}


def test_dora_needs_whole_rows() -> None:
    dora = {"name": "dora"}
    split = faults(peft=dora, parallel={"name": "tp", "tp": 2}, cluster__processes_per_node=2)
    assert "whole rows" in split["parallel.tp"].problem
    assert "norm of W" in faults(peft=dora, quant__scheme="nf4")["peft.name"].problem
    assert not faults(peft=dora)
    assert not faults(peft={"name": "rslora"}, quant__scheme="nf4")


# --- trainings --------------------------------------------------------------------------------------------

CASE: dict[str, Any] = {
    "peft__rank": 4, "optim__lr": 0.003, "optim__eps": 1e-6, "trainer__max_steps": 5, "trainer__eval_samples": 13,
    "data__seq_len": 80, "model__shape__max_position_embeddings": 80,
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(workers: Workers) -> dict[str, Finished]:
    return {name: workers.train(1, **CASE, peft__name=name) for name in METHODS[1:]}


def mesh(ranks: int, **parallel: Any) -> dict[str, Any]:
    return {"ranks": ranks, **{f"parallel__{key}": value for key, value in parallel.items()}}


STRATEGIES = {
    "ddp": mesh(2, name="ddp"),
    "fsdp": mesh(2, name="fsdp", dp_shard=2, dp_replicate=1),
    "hsdp": mesh(4, name="hsdp", dp_shard=2),
    "pp": mesh(2, name="pp", pp=2, dp_replicate=1),
    "cp": mesh(2, name="cp", cp=2, dp_replicate=1),
}


def points() -> list[Any]:
    quick = ("ddp", "fsdp")
    return [
        pytest.param(strategy, name, marks=() if strategy in quick else (pytest.mark.slow,))
        for strategy in STRATEGIES
        for name in METHODS[1:]
    ]


@pytest.mark.parametrize(("strategy", "name"), points())
def test_ranks_equal_one_process(
    workers: Workers, alone: dict[str, Finished], strategy: str, name: str
) -> None:
    settings = dict(STRATEGIES[strategy])
    many = workers.train(settings.pop("ranks"), **CASE, **settings, peft__name=name)
    one = alone[name]
    assert many.losses() == pytest.approx(one.losses(), rel=1e-5)
    assert many.evaluations() == pytest.approx(one.evaluations(), rel=1e-5)
    assert one.losses()[-1] < one.losses()[0]


def test_methods_differ(alone: dict[str, Finished]) -> None:
    assert alone["rslora"].losses()[-1] != pytest.approx(alone["dora"].losses()[-1], rel=1e-4)


@pytest.mark.parametrize("name", METHODS[1:])
def test_an_adapter_is_read_by_peft(alone: dict[str, Finished], name: str) -> None:
    from hpcdl.runs.spec import read_spec
    from hpcdl.worker.check_adapter import plain_loss

    run = alone[name]
    assert plain_loss(read_spec(run.run.spec_file), Path(run.result()["adapter"])) == pytest.approx(
        run.result()["eval_loss_after"], rel=1e-5
    )


@pytest.mark.parametrize("name", METHODS[1:])
def test_going_on_from_an_adapter(workers: Workers, alone: dict[str, Finished], name: str) -> None:
    before = alone[name].result()
    base = json.loads((Path(before["adapter"]) / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    more = {**CASE, "peft__name": name, "model__path": base, "peft__init_from": before["adapter"]}
    after = workers.train(1, **more)
    assert after.evaluations()[0] == pytest.approx(before["eval_loss_after"], rel=1e-6)
    assert after.evaluations()[5] < after.evaluations()[0]


def test_an_adapter_that_does_not_fit_is_refused(alone: dict[str, Finished]) -> None:
    rslora = alone["rslora"].result()["adapter"]

    def told(name: str, **keys: Any) -> str:
        found = faults(peft={"name": name, "rank": 4, "init_from": rslora, **keys})
        return found["peft.init_from"].problem + " → " + found["peft.init_from"].fix if found else ""

    assert told("rslora") == ""
    assert told("rslora", rank=8) == "has rank 4, and peft.rank is 8 → peft.rank=4"
    assert told("rslora", alpha=8) == "has alpha 32, and peft.alpha is 8 → peft.alpha=32"
    assert told("lora") == "was trained with peft=rslora → peft=rslora"
    assert "is of down_proj" in told("rslora", targets=["q_proj"])
    lost = faults(peft={"name": "lora", "init_from": rslora + "s"})["peft.init_from"]
    assert lost.nearest == "adapter" and lost.fix == f"peft.init_from={rslora}"
    # A run is as good as its adapter's folder.
    run = str(Path(rslora).parent)
    checked = experiment.check(tiny_plain(peft={"name": "rslora", "rank": 4, "init_from": run}))
    assert checked.spec is not None and checked.spec.peft.init_from == rslora  # type: ignore[attr-defined]


def test_a_torn_or_foreign_adapter_is_told(alone: dict[str, Finished], tmp_path: Path) -> None:
    adapter = Path(alone["rslora"].result()["adapter"])
    torn = tmp_path / "torn"
    shutil.copytree(adapter, torn)
    file = torn / "adapter_model.safetensors"
    last = max(shards.header(file).values(), key=lambda piece: piece.first).name
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(HpcdlError, match="cut short") as error:
        adapted("rslora", init_from=str(torn))
    assert str(file) in str(error.value) and last in str(error.value)
    with pytest.raises(HpcdlError, match=r"down_proj.lora_A.weight is \(4, 64\) there, and not here"):
        adapted("rslora", targets=["v_proj"], init_from=str(adapter))
