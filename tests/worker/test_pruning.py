"""Pruned models in training: zeros stay under every strategy and optimizer, through LoRA, checkpoints and merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcdl.errors import HpcdlError
from tests.factory import tiny_spec
from tests.worker.conftest import Finished, Workers

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from hpcdl.compress.prune import _masks  # noqa: E402
from hpcdl.distributed.zeros import keep  # noqa: E402
from hpcdl.worker import network, pruning  # noqa: E402
from hpcdl.worker.model import from_shape  # noqa: E402

WANDA: dict[str, Any] = {
    "prune__name": "wanda",
    "prune__calibration_samples": 4,
    "optim__weight_decay": 0.1,
    "trainer__max_steps": 6,
}


def saved(run: Finished) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(run.run.path / "model")


def zeros(model: Any) -> dict[str, Any]:
    return {name: layer.weight == 0 for name, layer in _masks.linears(model).items()}


def assert_same(found: Finished, expected: Finished) -> None:
    assert found.losses() == pytest.approx(expected.losses(), rel=1e-5)
    norms = [[m["grad_norm"] for m in run.run.metrics() if "loss" in m] for run in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.fixture(scope="module")
def one(workers: Workers) -> Finished:
    return workers.train(1, **WANDA)


def test_half_of_the_weights_are_zero_before_and_after(one: Finished) -> None:
    before = from_shape(tiny_spec().model.shape, "sdpa", 0)  # type: ignore[arg-type]
    after = saved(one)
    for mask in zeros(after).values():
        assert (mask.sum(1) == mask.shape[1] // 2).all()  # Wanda's, row by row
    moved = [
        int((new != old)[new != 0].sum()) / max(1, int((new != 0).sum()))
        for new, old in zip(after.parameters(), before.parameters(), strict=True)
        if new.ndim == 2
    ]
    assert min(moved) > 0.9  # all others are trained
    assert one.losses()[-1] < one.losses()[0]
    result = one.result()
    assert result["sparsity"] == 0.5 and 0 < result["sparsity_of_model"] < 0.5
    assert "| zeros | 50.00% of the blocks' linear layers" in (one.run.path / "card.md").read_text()


def on_two(strategy: str) -> dict[str, Any]:
    """Settings of a strategy on two ranks."""
    degree = {} if strategy in ("ddp", "fsdp") else {f"parallel__{strategy}": 2, "parallel__dp_replicate": 1}
    return {"parallel__name": strategy, **degree}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tp", "pp", "cp"])
def test_a_strategy_gives_the_losses_and_zeros_of_one_process(
    workers: Workers, one: Finished, strategy: str
) -> None:
    found = workers.train(2, **WANDA, **on_two(strategy))
    assert_same(found, one)
    mine, theirs = zeros(saved(found)), zeros(saved(one))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_hsdp_keeps_the_zeros(workers: Workers, one: Finished) -> None:
    found = workers.train(4, **WANDA, parallel__name="hsdp", parallel__dp_replicate=2, parallel__dp_shard=2)
    assert_same(found, one)
    assert found.result()["sparsity"] == 0.5


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("local_sgd", marks=pytest.mark.slow),
        pytest.param("diloco", marks=pytest.mark.slow),
        "hogwild",
        "param_server",
    ],
)
def test_copies_keep_the_zeros_too(workers: Workers, name: str) -> None:
    found = workers.train(2, **{**WANDA, "optim__weight_decay": 0.0}, parallel__name=name)
    assert found.result()["sparsity"] == 0.5


def test_momentum_and_decay_move_no_zero() -> None:
    layer = torch.nn.Linear(8, 8, bias=False)
    _masks.take_out(layer, torch.rand(8, 8) > 0.5)
    gone = layer.weight == 0
    keep(layer)
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    ):
        optimizer = make([layer.weight])
        before = layer.weight.detach().clone()
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.randn(4, 8)).square().sum().backward()
            assert not layer.weight.grad[gone].any()
            optimizer.step()
        assert torch.equal(layer.weight == 0, gone)
        assert ((layer.weight != before) | gone).all()


def test_the_gradient_is_the_dense_one_at_the_kept_weights() -> None:
    torch.manual_seed(0)
    dense = torch.nn.Linear(6, 5)
    _masks.take_out(dense, torch.rand(5, 6) > 0.4)
    pruned = torch.nn.Linear(6, 5)
    pruned.load_state_dict(dense.state_dict())
    keep(pruned)
    x = torch.randn(3, 6)
    outputs = [layer(x) for layer in (dense, pruned)]
    assert torch.equal(*outputs)
    for out in outputs:
        out.square().sum().backward()
    assert torch.equal(pruned.weight.grad, dense.weight.grad * (dense.weight != 0))
    assert torch.equal(pruned.bias.grad, dense.bias.grad)


# --- calibration is done once --------------------------------------------------------------------------------


def test_ranks_and_tries_read_the_same_masks(workers: Workers, cache: Path, one: Finished) -> None:
    again = workers.train(1, **WANDA)
    assert again.losses() == one.losses()
    folders = sorted((cache / "pruned").glob("wanda-*"))
    told = [json.loads((folder / "prune.json").read_text()) for folder in folders]
    mine = [t for t in told if t["calibration_samples"] == 4]
    assert len(mine) == 1 and mine[0]["sparsity_reached"] == 0.5


def test_calibration_is_of_training_rows_and_the_seed(
    workers: Workers, one: Finished, monkeypatch: Any
) -> None:
    from hpcdl.worker.data.prepare import open_dataset
    from hpcdl.worker.tokenizer import ByteTokenizer

    data = open_dataset(tiny_spec(), ByteTokenizer())
    rows = {bytes(row) for row in data.train.tokens[:, :-1].astype("int64")}
    heldout = {bytes(row) for row in data.heldout.tokens[:, :-1].astype("int64")} - rows
    drawn = [pruning.calibration(data.train, 8, seed) for seed in (0, 0, 1)]
    seen = [[bytes(b["input_ids"].numpy()[0]) for b in batches] for batches in drawn]
    assert seen[0] == seen[1] != seen[2] and len(set(seen[0])) > 1
    assert set(seen[0]) <= rows and not set(seen[0]) & heldout
    assert len(pruning.calibration(data.train, 10**6, 0)) == len(data.train)


def test_a_broken_file_of_masks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    path.write_bytes(b"\x20\0\0\0\0\0\0\0no")
    with pytest.raises(HpcdlError, match=r"masks\.safetensors is broken .*: delete its folder"):
        pruning._read(path, {"layer": torch.nn.Linear(2, 2)})


def test_a_method_that_needs_text_says_so() -> None:
    spec = tiny_spec(**WANDA)
    with pytest.raises(HpcdlError, match="prune=wanda looks at text"):
        network.prepare(spec, from_shape(spec.model.shape, "sdpa", 0), torch.device("cpu"))  # type: ignore[arg-type]


# --- going on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft", [{}, {"peft__name": "lora", "peft__rank": 4}], ids=["full", "lora"])
def test_a_resumed_run_has_the_same_zeros_and_losses(workers: Workers, peft: dict[str, Any]) -> None:
    import shutil

    options = {**WANDA, **peft, "trainer__checkpoint_every": 3, "trainer__keep_last": 5}
    run = workers.make(**options)
    whole = workers.go(run)
    losses, weights = whole.losses(), list(saved(whole).parameters())
    shutil.rmtree(run.checkpoints / "step-00000006")
    again = workers.go(run)
    assert again.losses() == losses  # to the last bit
    for a, b in zip(saved(again).parameters(), weights, strict=True):
        assert torch.equal(a, b)
    assert again.result()["sparsity"] == 0.5


# --- LoRA ------------------------------------------------------------------------------------------------------


LORA: dict[str, Any] = {**WANDA, "peft__name": "lora", "peft__rank": 4}


@pytest.fixture(scope="module")
def lora(workers: Workers) -> Finished:
    return workers.train(1, **LORA)


def test_lora_leaves_a_merged_model_with_the_bases_zeros(lora: Finished, one: Finished) -> None:
    assert lora.losses()[-1] < lora.losses()[0]
    result = lora.result()
    assert result["adapter"] is None and result["sparsity"] == 0.5
    mine, theirs = zeros(saved(lora)), zeros(saved(one))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp", "pp"])
def test_lora_on_a_pruned_base_under_a_strategy(workers: Workers, lora: Finished, strategy: str) -> None:
    found = workers.train(2, **LORA, **on_two(strategy))
    assert_same(found, lora)
    for a, b in zip(saved(found).parameters(), saved(lora).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def prepared(**dotted: Any) -> Any:
    spec = tiny_spec(**{"prune__name": "magnitude", "peft__name": "lora", "peft__rank": 4, **dotted})
    net = network.prepare(spec, from_shape(spec.model.shape, "sdpa", 0), torch.device("cpu"))  # type: ignore[arg-type]
    torch.manual_seed(1)
    for name, parameter in net.model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    return net.model


def test_what_is_trained_is_what_merges() -> None:
    model = prepared()
    tokens = torch.randint(0, 256, (2, 16))
    trained = model(input_ids=tokens).logits
    with model.disable_adapter():
        base = model(input_ids=tokens).logits
    assert (trained - base).abs().max() > 0.1
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=tokens).logits, trained, rtol=1e-4, atol=1e-5)
    assert all(mask.float().mean() == 0.5 for mask in zeros(merged).values())


def test_the_gradient_of_a_masked_update_is_autograds() -> None:
    model = prepared(peft__targets=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 32)
    whole = layer.base_layer.weight + (layer.base_layer.weight != 0) * (layer.scaling["default"] * b @ a)
    expected = torch.autograd.grad((x @ whole.T).square().sum(), (a, b))
    found = torch.autograd.grad(layer(x).square().sum(), (a, b))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_variants_of_lora_that_a_mask_would_change_are_refused() -> None:
    from hpcdl.compress import prune

    spec = tiny_spec(prune__name="magnitude", peft__name="dora")
    (fault,) = prune.get("magnitude").check(spec.prune, spec)
    assert "dora" in fault.problem and fault.fix == "peft=lora"


def test_a_base_in_four_bits_keeps_the_zeros_of_the_whole_one(workers: Workers, cache: Path) -> None:
    found = workers.train(1, **LORA, quant__scheme="nf4")
    assert found.result()["sparsity"] == 0.5 and found.losses()[-1] < found.losses()[0]
    for mask in zeros(saved(found)).values():
        assert (mask.sum(1) == mask.shape[1] // 2).all()


# --- a model that is pruned already ------------------------------------------------------------------------------


def test_zeros_of_a_folder_are_kept(workers: Workers, one: Finished) -> None:
    more = {"model__path": str(one.run.path / "model"), "prune__name": "keep", "trainer__max_steps": 3}
    found = workers.train(1, **more)
    mine, theirs = zeros(saved(found)), zeros(saved(one))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    lost = workers.train(1, **{**more, "prune__name": "none"})
    assert all(not mask.any() for mask in zeros(saved(lost)).values())


# --- little by little --------------------------------------------------------------------------------------------

CUBIC: dict[str, Any] = {
    "prune__schedule": "cubic",
    "prune__every": 2,
    "prune__until": 4,
    "trainer__max_steps": 6,
    "optim__weight_decay": 0.1,
}


def told(run: Finished) -> dict[int, float]:
    return {e["step"]: e["sparsity"] for e in run.run.events() if e["event"] == "pruned"}


@pytest.mark.parametrize("name", ["magnitude", "obd"])
def test_pruning_goes_on_while_training_does(workers: Workers, name: str) -> None:
    options: dict[str, Any] = {**CUBIC, "prune__name": name}
    if name == "obd":
        options["prune__calibration_samples"] = 2
    found = workers.train(2, **options)
    # 0.5·(1 - (1 - t/4)³), Zhu & Gupta
    assert told(found) == pytest.approx({2: 0.5 * (1 - 0.5**3), 4: 0.5}, abs=1e-3)
    assert found.result()["sparsity"] == pytest.approx(0.5, abs=1e-3)
    one = workers.train(1, **options)
    assert_same(found, one)
    mine, theirs = zeros(saved(found)), zeros(saved(one))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_resumed_run_goes_on_pruning(workers: Workers) -> None:
    import shutil

    options = {**CUBIC, "prune__name": "magnitude", "trainer__checkpoint_every": 3, "trainer__keep_last": 5}
    run = workers.make(**options)
    whole = workers.go(run)
    losses, weights = whole.losses(), list(saved(whole).parameters())
    shutil.rmtree(run.checkpoints / "step-00000006")
    again = workers.go(run)
    assert again.losses() == losses
    for a, b in zip(saved(again).parameters(), weights, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "problem", "fix"),
    [
        ({"prune__pattern": "2:4"}, "bit by bit", "prune.schedule=once"),
        ({"peft__name": "lora"}, "frozen base", "peft=none"),
        ({"parallel__name": "fsdp"}, "only plain ddp", "parallel=ddp"),
        ({"prune__name": "sparsegpt"}, "makes up for", "prune.schedule=once"),
        ({"prune__until": 7}, "after the last step 6", "prune.until=6"),
    ],
)
def test_what_cannot_go_on_bit_by_bit_is_refused(changes: dict[str, Any], problem: str, fix: str) -> None:
    from hpcdl.compress import prune

    spec = tiny_spec(**{**CUBIC, "prune__name": "magnitude", **changes})
    (fault,) = prune.get(spec.prune.name).check(spec.prune, spec)
    assert problem in fault.problem and fault.fix == fix and fault.key == "prune.schedule"
