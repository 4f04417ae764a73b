"""QLoRA: a base in 4 bits under LoRA, the same under every strategy that takes it; what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from hpcdl.compress.quant import fp4, nf4
from hpcdl.errors import Fault, HpcdlError
from tests.factory import tiny_spec
from tests.worker.conftest import Finished, Workers

pytest.importorskip("torch")
pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.torch

QLORA: dict[str, Any] = {
    "quant__scheme": "nf4",
    "peft__name": "lora",
    "peft__rank": 4,
    "optim__lr": 0.003,
    "optim__eps": 1e-6,
    "trainer__max_steps": 12,
}


HELD = {"quant__embedding": "none", "quant__head": "nf4"}


@pytest.fixture(scope="module")
def one(workers: Workers) -> Finished:
    return workers.train(1, **QLORA)


@pytest.fixture(scope="module")
def one_of_torchao(workers: Workers) -> Finished:
    return workers.train(1, **QLORA, quant__backend="torchao")


def assert_same(found: Finished, expected: Finished) -> None:
    assert found.losses() == pytest.approx(expected.losses(), rel=1e-5)
    norms = [[m["grad_norm"] for m in run.run.metrics() if "loss" in m] for run in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("strategy", [{"name": "ddp"}, {"name": "pp", "pp": 2, "dp_replicate": 1}])
def test_a_strategy_gives_the_losses_of_one_process(
    workers: Workers, one: Finished, strategy: dict[str, Any]
) -> None:
    found = workers.train(2, **QLORA, **{f"parallel__{key}": value for key, value in strategy.items()})
    assert_same(found, one)


def test_fsdp_gives_the_losses_of_one_process_with_torchao(
    workers: Workers, one: Finished, one_of_torchao: Finished
) -> None:
    assert_same(workers.train(2, **QLORA, parallel__name="fsdp"), one_of_torchao)
    # both hold NF4, and differ in how the scales are rounded
    assert one_of_torchao.losses() == pytest.approx(one.losses(), rel=1e-2)
    assert one_of_torchao.losses() != one.losses()


@pytest.mark.parametrize("strategy", [{"name": "ddp"}, {"name": "pp", "pp": 2, "dp_replicate": 1}])
def test_a_held_head_gives_the_same_losses_under_every_strategy(
    workers: Workers, one_held: Finished, strategy: dict[str, Any]
) -> None:
    found = workers.train(
        2, **QLORA, **HELD, **{f"parallel__{key}": value for key, value in strategy.items()}
    )
    assert_same(found, one_held)


@pytest.fixture(scope="module")
def one_held(workers: Workers) -> Finished:
    return workers.train(1, **QLORA, **HELD)


def test_a_held_head_learns_and_its_adapter_is_read_by_plain_peft(one: Finished, one_held: Finished) -> None:
    from hpcdl.worker import check_adapter

    assert one_held.losses()[0] != one.losses()[0]
    assert one_held.losses() == pytest.approx(one.losses(), rel=2e-2)
    assert one_held.result()["parameters"] == one.result()["parameters"]
    assert check_adapter.main(one_held.run) == 0


def test_the_base_is_quantized_and_learning_goes_on(workers: Workers, one: Finished) -> None:
    whole = workers.train(1, **{**QLORA, "quant__scheme": "none"})
    assert one.losses()[0] != pytest.approx(whole.losses()[0], rel=1e-6)
    assert one.losses()[0] == pytest.approx(whole.losses()[0], rel=1e-2)
    assert one.losses()[-1] < one.losses()[0]


def test_plain_peft_finds_the_same_loss_with_the_saved_adapter_and_base(one: Finished) -> None:
    from hpcdl.worker import check_adapter

    result = one.result()
    assert json.loads((one.run.path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert result["eval_loss_after"] < result["eval_loss_before"]
    assert check_adapter.main(one.run) == 0


# --- the weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [nf4, fp4])
@pytest.mark.parametrize("backend", ["bitsandbytes", "torchao"])
def test_blocks_are_held_and_the_rest_stays(scheme: Any, backend: str) -> None:
    import torch
    from torchao.quantization import NF4Tensor

    from hpcdl.distributed.held import HeldLinear
    from hpcdl.worker.model import from_shape

    name = scheme.__name__.rpartition(".")[2]
    config = scheme.Config(scheme=name, backend=backend)
    shape = tiny_spec().model.shape
    assert shape is not None
    model = from_shape(shape, "sdpa", 0)
    if (name, backend) == ("fp4", "torchao"):
        with pytest.raises(HpcdlError, match="torchao has none"):
            scheme.apply(config, model)
        return
    before = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    scheme.apply(config, model)
    held = {
        name
        for name, module in model.named_modules()
        if isinstance(module, HeldLinear) or isinstance(getattr(module, "weight", None), NF4Tensor)
    }
    assert held == {name for name, _ in model.named_modules() if name.endswith("_proj")}
    layer = model.model.layers[0].mlp.down_proj
    assert not layer.weight.requires_grad
    again = layer.matrix.whole(torch.float32) if backend == "bitsandbytes" else layer.weight.to(torch.float32)
    # the widest gap between two levels is 0.30 (NF4) or 0.33 (FP4) of a block's largest weight
    largest = before.abs().view(-1, 64).amax(1, keepdim=True)
    assert ((again - before).abs().view(-1, 64) <= 0.18 * largest).all()
    assert (again - before).abs().max() > 0
    scheme.apply(config, model)  # what is held already stays
    assert model.model.layers[0].mlp.down_proj is layer


def test_merging_into_four_bits_is_refused() -> None:
    import torch

    from hpcdl import compress
    from hpcdl.worker.model import from_shape

    spec = tiny_spec(**QLORA)
    assert spec.model.shape is not None
    model = nf4.apply(spec.quant, from_shape(spec.model.shape, "sdpa", 0))  # type: ignore[arg-type]
    tuned: Any = compress.get("lora").apply(spec.peft, model)
    before = tuned(input_ids=torch.arange(8)[None]).logits
    for merge in (tuned.merge_adapter, tuned.merge_and_unload):
        with pytest.raises(HpcdlError, match="can't be merged into"):
            merge()
    assert torch.equal(tuned(input_ids=torch.arange(8)[None]).logits, before)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [(4096, (64, 64)), (14336, (64, 224)), (576, (64, 9)), (32, (32, 1)), (48, (16, 3)), (64 * 257, (64, 1))],
)
def test_blocks_and_scales_divide_a_row(columns: int, expected: tuple[int, int]) -> None:
    from hpcdl.compress.quant import _torchao

    block, scales = _torchao.block_sizes("q_proj", columns)
    assert (block, scales) == expected
    assert columns % (block * scales) == 0


def test_a_matrix_that_makes_no_blocks_is_refused() -> None:
    from hpcdl.compress.quant import _torchao

    with pytest.raises(HpcdlError, match="q_proj has 36 columns, no multiple of 16"):
        _torchao.block_sizes("q_proj", 36)


def test_rows_that_fsdp_cannot_share_are_refused_on_the_worker(workers: Workers) -> None:
    run = workers.make(**QLORA, parallel__name="fsdp", trainer__global_batch_size=6)
    found = workers.go(run, 3, ok=False)
    assert any(found.codes)
    assert "FSDP over 3 ranks (dp_shard × cp) can't share the 32 rows of" in found.log


# --- before submission ---------------------------------------------------------------------------------------


def faults(**dotted: Any) -> list[Fault]:
    spec = tiny_spec(**{**QLORA, **dotted})
    from hpcdl.compress import quant

    return list(quant.get(spec.quant.scheme).check(spec.quant, spec))


def test_qlora_is_taken() -> None:
    assert faults() == []
    assert faults(parallel__name="fsdp", cluster__processes_per_node=4) == []


@pytest.mark.parametrize(
    ("changes", "problem", "fix"),
    [
        ({"peft": {"name": "none"}}, "can't take updates", "peft=lora"),
        ({"parallel__tp": 2, "cluster__processes_per_node": 2}, "tensor parallel", "parallel.tp=1"),
        ({"model__shape__intermediate_size": 48}, "intermediate_size 48 is no multiple of 32", "quant=none"),
        (
            {"model__shape__intermediate_size": 72, "quant__backend": "torchao"},
            "intermediate_size 72 is no multiple of 16",
            "quant=none",
        ),
        (
            {"parallel__name": "fsdp", "cluster__processes_per_node": 3},
            "3 ranks can't share the model's hidden_size 32 evenly",
            "parallel=ddp",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(changes: dict[str, Any], problem: str, fix: str) -> None:
    dotted = {
        key: value for key, value in QLORA.items() if not (key.startswith("peft") and "peft" in changes)
    }
    spec = tiny_spec(**{**dotted, **changes})
    (fault,) = nf4.check(spec.quant, spec)  # type: ignore[arg-type]
    assert problem in fault.problem and fault.fix == fix and fault.key == "quant.scheme"


@pytest.mark.parametrize(
    ("changes", "key", "problem", "fix"),
    [
        (
            {"quant__backend": "bitsandbytes", "parallel__name": "fsdp", "cluster__processes_per_node": 2},
            "quant.backend",
            "FSDP can't shard bitsandbytes'",
            "quant.backend=auto",
        ),
        (
            {"quant__scheme": "fp4", "parallel__name": "fsdp", "cluster__processes_per_node": 2},
            "quant.scheme",
            "torchao has no fp4",
            "quant=nf4, or parallel=ddp",
        ),
        (
            {"quant__scheme": "fp4", "quant__backend": "torchao"},
            "quant.scheme",
            "torchao has no fp4",
            "quant=nf4, or quant.backend=auto",
        ),
        (
            {"quant__head": "int8", "parallel__name": "fsdp", "cluster__processes_per_node": 2},
            "quant.head",
            "FSDP can't shard",
            "quant.head=none",
        ),
        (
            {"quant__embedding": "int8"},
            "quant.embedding",
            "one matrix, and quant.head is none",
            "quant.head=int8",
        ),
    ],
)
def test_holders_and_edges_that_cannot_be_are_refused(
    changes: dict[str, Any], key: str, problem: str, fix: str
) -> None:
    (fault,) = faults(**changes)
    assert fault.key == key and problem in fault.problem and fault.fix == fix


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"bitsandbytes"}),
        ({"parallel__name": "fsdp", "cluster__processes_per_node": 2}, {"torchao"}),
        ({"quant__backend": "torchao", "quant__head": "nf4"}, {"torchao", "bitsandbytes"}),
        ({"quant": {"scheme": "none"}}, set()),
        ({"quant": {"scheme": "none"}, "optim__name": "adamw8bit"}, {"bitsandbytes"}),
    ],
)
def test_a_process_imports_what_it_uses(changes: dict[str, Any], expected: set[str]) -> None:
    from hpcdl.compress import quant

    dotted = {k: v for k, v in QLORA.items() if not (k.startswith("quant") and "quant" in changes)}
    assert set(quant.needs(tiny_spec(**{**dotted, **changes}))) == expected


def test_what_is_not_used_is_not_imported() -> None:
    code = (
        "import importlib.util, sys; from hpcdl.compress import quant; quant.hide_unused(sys.argv[1:]); "
        "print([importlib.util.find_spec(name) is not None for name in ('torchao', 'bitsandbytes')])"
    )
    for used, there in (([], "[False, False]"), (["torchao"], "[True, False]")):
        run = [sys.executable, "-c", code, *used]
        assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == there
