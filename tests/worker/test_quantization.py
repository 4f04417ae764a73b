"""Whole-number schemes: their numbers against torchao's, gradients, training beside them and through them."""

from __future__ import annotations

from typing import Any

import pytest

from hpcdl.compress.quant import int4, int8, int8_dynamic
from tests.factory import tiny_spec
from tests.worker.conftest import Finished, Workers

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SCHEMES = {"int8": int8, "int8_dynamic": int8_dynamic, "int4": int4}
GROUPS: dict[str, Any] = {"quant__scheme": "int4", "quant__group_size": 32}
LORA: dict[str, Any] = {
    "peft__name": "lora",
    "peft__rank": 4,
    "optim__lr": 0.003,
    "optim__eps": 1e-6,
    "trainer__max_steps": 12,
}


def config(scheme: str, **keys: Any) -> Any:
    if scheme == "int4":
        keys = {"group_size": 32, **keys}
    return SCHEMES[scheme].Config(scheme=scheme, **keys)


def linear(rows: int = 48, columns: int = 64, *, bias: bool = False) -> Any:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = torch.nn.Linear(columns, rows, bias=bias)
        with torch.no_grad():
            made.weight *= torch.rand(rows, 1) * 4
            made.weight[2] = 0
        return made.requires_grad_(False)


def held(scheme: str, made: Any) -> Any:
    module = SCHEMES[scheme]
    return module.layer(config(scheme), made, module.pack(config(scheme), made.weight))


# --- numbers -------------------------------------------------------------------------------------------------


def test_int4_levels_are_torchaos() -> None:
    import torch

    ao = pytest.importorskip("torchao.quantization.quant_primitives")
    weight, matrix = linear().weight, held("int4", linear()).matrix
    scale, zero = ao.choose_qparams_affine(
        weight, ao.MappingType.ASYMMETRIC, (1, 32), torch.uint8, 0, 15, scale_dtype=torch.float32
    )
    used = weight.unflatten(1, (-1, 32)).any(-1)
    assert (matrix.scale.float()[used] / scale[used] - 1).abs().max() <= 2**-8  # bf16
    assert (matrix.zero.int() - zero)[used].abs().max() <= 1  # theirs is of the scale before it is rounded
    scale, zero = matrix.scale.float(), matrix.zero.int()
    level = ao.quantize_affine(weight, (1, 32), scale, zero, torch.uint8, 0, 15)
    whole = ao.dequantize_affine(level, (1, 32), scale, zero, torch.uint8, 0, 15)
    assert torch.equal(matrix.whole(torch.float32), whole)


def test_int8_levels_are_torchaos() -> None:
    import torch

    ao = pytest.importorskip("torchao.quantization.quant_primitives")
    weight, matrix = linear().weight, held("int8", linear()).matrix
    scale, _ = ao.choose_qparams_affine(
        weight, ao.MappingType.SYMMETRIC, (1, 64), torch.int8, -127, 127, scale_dtype=torch.float32, eps=0
    )
    assert torch.allclose(matrix.scale, scale.flatten(), rtol=1e-6)
    scale, zero = matrix.scale[:, None].clamp(min=1e-9), torch.zeros(48, 1, dtype=torch.int32)
    level = ao.quantize_affine(weight, (1, 64), scale, zero, torch.int8, -127, 127)
    # ours multiplies by 1 / scale: at a middle the last bit decides
    assert ((level - matrix.weight).abs() > 0).float().mean() < 0.001


@pytest.mark.parametrize(("scheme", "bits"), [("int4", 4.75), ("int8", 8.5), ("int8_dynamic", 8.5)])
def test_what_is_kept_is_what_memory_says(scheme: str, bits: float) -> None:
    from hpcdl.spec.layout import Matrix

    layer = held(scheme, linear())
    kept = sum(p.nbytes for p in layer.parameters())
    said = SCHEMES[scheme].memory(
        config(scheme), Matrix(name="q_proj", role="block", rows=48, columns=64, count=1), 4, 4
    )
    assert kept == said.bytes == bits / 8 * 48 * 64
    norm = SCHEMES[scheme].memory(
        config(scheme), Matrix(name="norm", role="norm", rows=64, columns=1, count=1), 4, 4
    )
    assert norm.bytes == 256 and norm.whole == 0


def test_rounding_is_to_the_nearest_level() -> None:
    import torch

    weight = linear().weight
    for scheme in ("int4", "int8"):
        matrix = held(scheme, linear()).matrix
        off = (matrix.whole(torch.float32) - weight).abs()
        if scheme == "int8":
            assert (off <= matrix.scale[:, None] * 0.5001).all()
        else:  # half a step, and what rounding the scale may cut off at the ends: 15 levels of 2^-9
            step = matrix.scale.float().repeat_interleave(32, 1)
            assert (off <= step * (0.5001 + 15 * 2**-8)).all()


def test_zeros_and_signs() -> None:
    import torch

    made = linear(3, 32)
    made.weight[0], made.weight[1], made.weight[2] = 0.0, torch.linspace(1, 2, 32), torch.linspace(-2, -1, 32)
    for scheme in SCHEMES:
        whole = held(scheme, made).matrix.whole(torch.float32)
        assert (whole[0] == 0).all()
        assert torch.allclose(whole, made.weight, atol=0.08), scheme


def test_rows_and_picks_are_of_the_whole() -> None:
    import torch

    ids = torch.tensor([[5, 0], [47, 5]])
    for scheme in ("int4", "int8"):
        matrix = held(scheme, linear()).matrix
        for dtype in (torch.float32, torch.bfloat16):
            whole = matrix.whole(dtype)
            assert torch.equal(matrix.rows(7, 19, dtype), whole[7:19])
            assert torch.equal(matrix.pick(ids, dtype), whole[ids])
        assert torch.equal(matrix.whole(torch.float32).bfloat16(), matrix.whole(torch.bfloat16))


def test_numbers_that_are_none_are_refused() -> None:
    from hpcdl.errors import HpcdlError

    made = linear()
    made.weight[1, 2] = float("inf")
    for scheme, module in SCHEMES.items():
        with pytest.raises(HpcdlError, match="infinite or no numbers"):
            module.pack(config(scheme), made.weight)
    with pytest.raises(HpcdlError, match="48 columns makes no whole groups of 32"):
        int4.pack(config("int4"), linear(8, 48).weight)


# --- products and gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
def test_products_and_gradients_are_those_of_the_whole_matrix(scheme: str, bf16: bool, tokens: int) -> None:
    import torch

    layer = held(scheme, linear(bias=True))
    states = torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(1))
    mine, theirs = states.clone().requires_grad_(), states.clone().requires_grad_()
    whole = layer.matrix.whole(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = layer(mine)
        expected = torch.nn.functional.linear(theirs, whole, layer.bias)
    close = {"rtol": 2e-2, "atol": 5e-2} if bf16 else {"rtol": 1e-5, "atol": 1e-5}
    assert out.dtype == expected.dtype
    assert torch.allclose(out, expected, **close)
    back = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * back).sum().backward()
    (expected * back).sum().backward()
    assert mine.grad is not None and theirs.grad is not None
    assert torch.allclose(mine.grad, theirs.grad, **close)


def test_dynamic_products_are_of_rounded_inputs_and_gradients_pass_straight() -> None:
    import torch

    layer = held("int8_dynamic", linear())
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    scale = states.detach().abs().amax(1, keepdim=True) / 127
    rounded = (states.detach() / scale).round() * scale
    whole = layer.matrix.whole(torch.float32)
    out = layer(states)
    assert torch.allclose(out, rounded @ whole.T, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, states @ whole.T, rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert states.grad is not None
    assert torch.allclose(states.grad, torch.ones(5, 48) @ whole, rtol=1e-5, atol=1e-5)


def test_a_token_of_zeros_stays_zero() -> None:
    import torch

    assert (held("int8_dynamic", linear())(torch.zeros(2, 64)) == 0).all()


# --- calibrated rounding ---------------------------------------------------------------------------------------


def inputs(tokens: int = 2000, columns: int = 64) -> Any:
    """Correlated, of sizes a hundredfold apart, one of them silent: as activations are."""
    import torch

    draw = torch.Generator().manual_seed(3)
    mixed = torch.randn(tokens, columns, generator=draw) @ torch.randn(columns, columns, generator=draw)
    mixed = mixed * torch.logspace(0, -2, columns)
    mixed[:, 7] = 0
    return mixed


def output_error(whole: Any, made: Any, states: Any) -> float:
    return float((states @ (whole - made.weight).T).square().mean())


def test_the_calibrated_layers_output_is_nearer_than_with_each_weight_at_its_nearest() -> None:
    import torch

    from hpcdl.compress.quant import _affine, _calibrate

    made, states = linear(), inputs()
    hessian = states.T @ states
    nearest = held("int4", made).matrix.whole(torch.float32)
    scale, zero = _calibrate.searched4(made.weight, hessian.diagonal(), 32)
    searched = _affine.from_levels4(_affine.nearest4(made.weight, scale, zero), scale, zero, torch.float32)
    whole = _affine.from_levels4(*_calibrate.rounded4(made.weight, hessian, 32), torch.float32)
    errors = [output_error(one, made, states) for one in (nearest, searched, whole)]
    assert errors[2] < 0.5 * errors[0]
    assert errors[2] < errors[1] < errors[0]


def test_calibrated_rounding_is_gptqs() -> None:
    """Against the paper's own steps, a column at a time with H's inverse updated by elimination (equations 2, 3)."""
    import torch

    from hpcdl.compress.quant import _calibrate

    made, states = linear(), inputs()
    hessian = (states.T @ states / len(states)).double()
    levels, scale, zero = _calibrate.rounded4(made.weight, hessian, 32)
    left = made.weight.double().clone()
    left[:, 7] = 0
    damped = hessian.clone()
    diagonal = damped.diagonal()
    order = diagonal.argsort(descending=True).tolist()
    diagonal[7] = 1
    diagonal += _calibrate.DAMPING * diagonal.mean()
    inverse = torch.linalg.inv(damped)
    for column in order:
        s, z = scale[:, column // 32].double(), zero[:, column // 32].double()
        expected = ((left[:, column] / s).round() + z).clamp(0, 15)
        assert (expected == levels[:, column]).double().mean() > 0.99, column  # in fp32 and fp64
        error = (left[:, column] - (levels[:, column] - z) * s) / inverse[column, column]
        left -= error[:, None] * inverse[column]
        inverse -= inverse[:, column, None] * inverse[column] / inverse[column, column].clone()


def test_what_was_pruned_stays_zero() -> None:
    import torch

    from hpcdl.compress.quant import _affine, _calibrate

    made, states = linear(), inputs()
    gone = torch.rand(48, 64, generator=torch.Generator().manual_seed(5)) < 0.5
    made.weight[gone] = 0
    found = _calibrate.rounded4(made.weight, states.T @ states, 32)
    assert (_affine.from_levels4(*found, torch.float32)[gone] == 0).all()


# --- training ------------------------------------------------------------------------------------------------


def scheme_keys(scheme: str) -> dict[str, Any]:
    return {"quant__scheme": scheme} | ({"quant__group_size": 32} if scheme == "int4" else {})


@pytest.fixture(scope="module")
def plain(workers: Workers) -> Finished:
    return workers.train(1, **LORA)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_lora_learns_beside_whole_numbers(workers: Workers, plain: Finished, scheme: str) -> None:
    found = workers.train(1, **LORA, **scheme_keys(scheme))
    assert found.losses()[0] != plain.losses()[0]
    assert found.losses() == pytest.approx(plain.losses(), rel=0.02 if scheme == "int4" else 0.002)
    assert found.result()["eval_loss_after"] < found.result()["eval_loss_before"] - 0.1


@pytest.mark.parametrize(
    "strategy",
    [{"name": "ddp"}, pytest.param({"name": "pp", "pp": 2, "dp_replicate": 1}, marks=pytest.mark.slow)],
)
def test_a_strategy_gives_the_losses_of_one_process(workers: Workers, strategy: dict[str, Any]) -> None:
    keys = {**LORA, **scheme_keys("int4"), "trainer__max_steps": 4}
    one = workers.train(1, **keys)
    two = workers.train(2, **keys, **{f"parallel__{key}": value for key, value in strategy.items()})
    assert two.losses() == pytest.approx(one.losses(), rel=1e-5)


# --- training through the rounding ---------------------------------------------------------------------------

QAT: dict[str, Any] = {"quant__qat": True, "trainer__max_steps": 12, "trainer__eval_samples": 8}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_pass_straight_through_the_rounding(scheme: str) -> None:
    import torch

    from hpcdl.compress.quant import _affine, _qat

    def rounding(weight: Any) -> Any:
        return _affine.rounded4(weight, 32) if scheme == "int4" else _qat.rounded8(weight)

    plain = linear(bias=True).requires_grad_()
    fake = _qat.FakeLinear(linear(bias=True).requires_grad_(), rounding, inputs=scheme == "int8_dynamic")
    states = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    held_one = held(scheme, linear(bias=True))
    out = fake(states)
    assert torch.allclose(out, held_one(states), rtol=1e-5, atol=1e-5)
    out.sum().backward()
    grad, states.grad = states.grad, None
    held_one(states).sum().backward()
    assert torch.allclose(grad, states.grad, rtol=1e-5, atol=1e-5)
    (plain(states.detach() if scheme != "int8_dynamic" else rounded_tokens(states.detach()))).sum().backward()
    assert torch.allclose(fake.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(fake.bias.grad, plain.bias.grad)


def rounded_tokens(states: Any) -> Any:
    scale = states.abs().amax(-1, keepdim=True) / 127
    return (states / scale).round() * scale


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_converted_model_has_the_loss_that_training_through_the_rounding_ended_with(
    workers: Workers, scheme: str
) -> None:
    from tests.worker.tools import tool

    run = workers.train(1, **QAT, **scheme_keys(scheme))
    result = run.result()
    assert result["eval_loss_after"] < result["eval_loss_before"] - 0.2
    model = {"name": "trained", "path": result["model"], "tokenizer": "byte"}
    shared = {"model": model, "peft__name": "lora", "trainer__eval_samples": 8}
    converted = tool(workers, "eval", **shared, **scheme_keys(scheme))
    assert converted["eval_loss"] == pytest.approx(result["eval_loss_after"], rel=2e-6)
    if scheme == "int4":  # int8's rounding is seen in the sixth digit only
        whole = tool(workers, "eval", **shared)
        assert whole["eval_loss"] != pytest.approx(result["eval_loss_after"], rel=1e-4)


def test_training_through_the_rounding_beats_rounding_afterwards(workers: Workers) -> None:
    from tests.worker.tools import tool

    steps = {"trainer__max_steps": 40, "trainer__eval_samples": 12}
    through = workers.train(1, **{**QAT, **scheme_keys("int4"), **steps}).result()["eval_loss_after"]
    plain = workers.train(1, **steps).result()
    model = {"name": "trained", "path": plain["model"], "tokenizer": "byte"}
    after = tool(workers, "eval", model=model, **steps, **scheme_keys("int4"), peft__name="lora")["eval_loss"]
    assert plain["eval_loss_after"] < after
    assert through < after


def test_fsdp_trains_through_the_rounding_as_one_process_does(workers: Workers) -> None:
    keys = {**QAT, **scheme_keys("int4"), "trainer__max_steps": 4}
    one, two = workers.train(1, **keys), workers.train(2, **keys, parallel__name="fsdp")
    assert two.losses() == pytest.approx(one.losses(), rel=1e-4)


# --- before submission -----------------------------------------------------------------------------------------


def test_what_can_be_is_taken() -> None:
    for scheme, module in SCHEMES.items():
        for keys in (LORA, QAT):
            spec = tiny_spec(**keys, **scheme_keys(scheme))
            assert list(module.check(spec.quant, spec)) == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("changes", "problem", "fix"),
    [
        ({}, "which can't take updates, and peft=none trains them", "peft=lora"),
        ({**LORA, "quant__qat": True}, "peft=lora freezes them", "peft=none"),
        ({**LORA, "parallel__tp": 2, "cluster__processes_per_node": 2}, "tensor parallel", "parallel.tp=1"),
        ({**QAT, "parallel__tp": 2, "cluster__processes_per_node": 2}, "tensor parallel", "parallel.tp=1"),
        ({**LORA, "parallel__name": "fsdp", "cluster__processes_per_node": 2}, "aten.split", "parallel=ddp"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    scheme: str, changes: dict[str, Any], problem: str, fix: str
) -> None:
    spec = tiny_spec(**{**scheme_keys(scheme), **changes})
    (fault,) = SCHEMES[scheme].check(spec.quant, spec)
    assert problem in fault.problem and fault.fix == fix and fault.key.startswith("quant.")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"quant__group_size": 64}, "matrices of 32 columns, no multiple of 64"),
        ({"model__shape__intermediate_size": 80}, "matrices of 80 columns, no multiple of 32"),
        ({**QAT, "peft__name": "none", "quant__calibration_samples": 8}, "rounds a trained model once"),
    ],
)
def test_what_int4_cannot_hold(changes: dict[str, Any], problem: str) -> None:
    base = {"peft__name": "lora"} | GROUPS
    spec = tiny_spec(**{**base, **changes})
    (fault,) = int4.check(spec.quant, spec)  # type: ignore[arg-type]
    assert problem in fault.problem
