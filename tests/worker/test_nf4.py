"""QLoRA: a base in 4 bits under LoRA, the same under every strategy that takes it; what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from hpcdl.compress.quant import nf4
from hpcdl.errors import Fault, HpcdlError
from tests.factory import tiny_spec
from tests.worker.conftest import Finished, Workers

pytest.importorskip("torch")
pytest.importorskip("torchao")
pytestmark = pytest.mark.torch

QLORA: dict[str, Any] = {
    "quant__scheme": "nf4",
    "peft__name": "lora",
    "peft__rank": 4,
    "optim__lr": 0.003,
    "optim__eps": 1e-6,
    "trainer__max_steps": 12,
}


@pytest.fixture(scope="module")
def one(workers: Workers) -> Finished:
    return workers.train(1, **QLORA)


def assert_same(found: Finished, expected: Finished) -> None:
    assert found.losses() == pytest.approx(expected.losses(), rel=1e-5)
    norms = [[m["grad_norm"] for m in run.run.metrics() if "loss" in m] for run in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize(
    "strategy", [{"name": "ddp"}, {"name": "fsdp"}, {"name": "pp", "pp": 2, "dp_replicate": 1}]
)
def test_a_strategy_gives_the_losses_of_one_process(
    workers: Workers, one: Finished, strategy: dict[str, Any]
) -> None:
    found = workers.train(2, **QLORA, **{f"parallel__{key}": value for key, value in strategy.items()})
    assert_same(found, one)


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


def test_blocks_have_torchao_tensors_and_the_rest_stays() -> None:
    import torch
    from torchao.quantization import NF4Tensor

    from hpcdl.worker.model import from_shape

    shape = tiny_spec().model.shape
    assert shape is not None
    model = from_shape(shape, "sdpa", 0)
    before = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    nf4.apply(nf4.Config(scheme="nf4"), model)
    kinds = {name: isinstance(p, NF4Tensor) for name, p in model.named_parameters()}
    assert {name for name, is_nf4 in kinds.items() if is_nf4} == {
        name for name in kinds if name.endswith("_proj.weight")
    }
    held = model.model.layers[0].mlp.down_proj.weight
    assert not held.requires_grad and held.quantized_data.numel() == before.numel() // 2
    again = held.to(torch.float32)
    # the widest gap between two levels is 0.30 of a block's largest weight
    largest = before.abs().view(-1, 64).amax(1, keepdim=True)
    assert ((again - before).abs().view(-1, 64) <= 0.17 * largest).all()


@pytest.mark.parametrize(
    ("columns", "expected"),
    [(4096, (64, 64)), (14336, (64, 224)), (576, (64, 9)), (32, (32, 1)), (48, (16, 3)), (64 * 257, (64, 1))],
)
def test_blocks_and_scales_divide_a_row(columns: int, expected: tuple[int, int]) -> None:
    block, scales = nf4.block_sizes("q_proj", columns)
    assert (block, scales) == expected
    assert columns % (block * scales) == 0


def test_a_matrix_that_makes_no_blocks_is_refused() -> None:
    with pytest.raises(HpcdlError, match="q_proj has 36 columns, no multiple of 16"):
        nf4.block_sizes("q_proj", 36)


def test_rows_that_fsdp_cannot_share_are_refused_on_the_worker(workers: Workers) -> None:
    run = workers.make(**QLORA, parallel__name="fsdp", trainer__global_batch_size=6)
    found = workers.go(run, 3, ok=False)
    assert any(found.codes)
    assert "FSDP over 3 ranks (dp_shard × cp) can't share the 32 rows of" in found.log


# --- before submission ---------------------------------------------------------------------------------------


def faults(**dotted: Any) -> list[Fault]:
    spec = tiny_spec(**{**QLORA, **dotted})
    return list(nf4.check(spec.quant, spec))  # type: ignore[arg-type]


def test_qlora_is_taken() -> None:
    assert faults() == []
    assert faults(parallel__name="fsdp", cluster__processes_per_node=4) == []


@pytest.mark.parametrize(
    ("changes", "problem", "fix"),
    [
        ({"peft": {"name": "none"}}, "can't take updates", "peft=lora"),
        ({"parallel__tp": 2, "cluster__processes_per_node": 2}, "tensor parallel", "parallel.tp=1"),
        ({"model__shape__intermediate_size": 72}, "intermediate_size 72 is no multiple of 16", "quant=none"),
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


def test_a_process_that_quantizes_nothing_does_not_import_torchao() -> None:
    code = (
        "import importlib.util, sys; from hpcdl.compress import quant; quant.hide_unused(sys.argv[1]); "
        "print(importlib.util.find_spec('torchao') is not None)"
    )
    for scheme, there in (("none", "False"), ("nf4", "True")):
        run = [sys.executable, "-c", code, scheme]
        assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == there
