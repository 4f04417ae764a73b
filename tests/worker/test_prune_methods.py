"""Masks and solvers against plain formulas of the papers, on random layers and a tiny decoder."""

from __future__ import annotations

from typing import Any

import pytest

from hpcdl.compress import prune
from hpcdl.errors import Fault, HpcdlError
from tests.factory import tiny_spec

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from hpcdl.compress.prune import _language, _layerwise, _masks, _obs, _zeros, wanda  # noqa: E402
from hpcdl.distributed.decoder import trunk  # noqa: E402
from hpcdl.worker.model import from_shape  # noqa: E402

METHODS = ("magnitude", "wanda", "sparsegpt", "obd")


def config(name: str, **keys: Any) -> Any:
    if prune.get(name).CALIBRATED:
        keys.setdefault("calibration_samples", 4)
    return prune.get(name).Config(name=name, **keys)


def tiny(seed: int = 0) -> Any:
    shape = tiny_spec().model.shape
    assert shape is not None
    return from_shape(shape, "sdpa", seed)


def text(rows: int = 4, length: int = 24) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, 256, (rows, 1, length + 1), generator=generator)
    positions = torch.arange(length)[None] % 15  # two documents a row
    return [
        {
            "input_ids": t[:, :-1],
            "labels": t[:, 1:],
            "position_ids": positions,
            "real": torch.ones(1, length).bool(),
        }
        for t in tokens
    ]


def random_layer(rows: int = 12, columns: int = 32, tokens: int = 200) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x


# --- masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 17, 60, 119, 120])
def test_the_smallest_of_several_tensors_go(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        scores = [torch.rand(shape, generator=generator).to(dtype) for shape in ((5, 8), (10, 8))]
        kept = _masks.all_but_smallest(scores, count)
        flat = torch.cat([s.flatten() for s in scores])
        mask = torch.cat([k.flatten() for k in kept])
        assert int((~mask).sum()) == count
        if 0 < count < 120:
            assert flat[~mask].max() <= flat[mask].min()


def test_equal_scores_are_cut_to_the_count() -> None:
    (kept,) = _masks.all_but_smallest([torch.tensor([[0.0, 1.0, 1.0], [1.0, -0.0, 2.0]])], 3)
    assert kept.tolist() == [[False, False, True], [True, False, True]]


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_scores_that_say_nothing_are_refused(bad: float) -> None:
    with pytest.raises(HpcdlError, match="negative or no number"):
        _masks.all_but_smallest([torch.tensor([1.0, bad])], 1)


def test_groups_have_exactly_so_many_zeros() -> None:
    scores = torch.rand(6, 32)
    for zeros, group in ((2, 4), (4, 8)):
        kept = _masks.keep_in_groups(scores, zeros, group)
        assert (kept.view(6, -1, group).sum(-1) == group - zeros).all()
        for chunk, mask in zip(scores.view(-1, group), kept.view(-1, group), strict=True):
            assert chunk[~mask].max() <= chunk[mask].min()
    with pytest.raises(HpcdlError, match="a row of 30 weights has no whole groups"):
        _masks.keep_in_groups(torch.rand(2, 30), 2, 4)


def test_bits_come_back_as_they_were() -> None:
    mask = torch.rand(7, 11) > 0.5
    bits = _zeros.pack(mask)
    assert bits.dtype == torch.uint8 and bits.numel() == 10
    assert torch.equal(_zeros.unpack(bits, 77).view(7, 11), mask)


# --- Wanda ---------------------------------------------------------------------------------------------------


def test_wanda_takes_the_lowest_of_each_row_by_the_papers_score() -> None:
    weight, x = random_layer()
    seen = _layerwise.SquaredNorms(torch.nn.Linear(32, 12))
    for part in x.split(64):
        seen.add(part)
    score = wanda.score(weight, seen.norms())
    torch.testing.assert_close(score, weight.abs() * x.norm(dim=0), rtol=1e-5, atol=0, check_dtype=False)
    kept = _masks.keep(score, config("wanda", sparsity=0.3))
    for row, mask in zip(weight.abs() * x.norm(dim=0), kept, strict=True):
        lowest = set(row.argsort()[: int(0.3 * 32)].tolist())  # algorithm 1
        assert set((~mask).nonzero().flatten().tolist()) == lowest
    whole = _masks.keep(score, config("wanda", sparsity=0.5, scope="layer"))
    assert int((~whole).sum()) == 12 * 16 and len(set((~whole).sum(1).tolist())) > 1


# --- SparseGPT -----------------------------------------------------------------------------------------------


def slow_obs(weight: Any, hessian: Any, block: int, sparsity: float, groups: tuple[int, int] | None) -> Any:
    """Column by column, with the inverse of what is left of the Hessian made anew at each (section 3.2)."""
    w, columns = weight.clone(), weight.shape[1]
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    gone = torch.zeros_like(w, dtype=torch.bool)
    for j in range(columns):
        span = groups[1] if groups else block
        if j % span == 0:
            columns_here = range(j, min(j + span, columns))
            saliency = torch.stack([w[:, c] ** 2 / inverses[c][0, 0] for c in columns_here], 1)
            if groups:
                order = saliency.argsort(1)[:, : groups[0]]
                gone[:, j : j + span] = torch.zeros_like(saliency, dtype=torch.bool).scatter_(1, order, True)
            else:
                lowest = saliency.flatten().argsort()[: int(saliency.numel() * sparsity)]
                chosen = torch.zeros(saliency.numel(), dtype=torch.bool)
                chosen[lowest] = True
                gone[:, j : j + span] = chosen.view_as(saliency)
        for row in range(len(w)):
            if gone[row, j]:
                w[row, j:] -= w[row, j] / inverses[j][0, 0] * inverses[j][0]
                w[row, j] = 0
    return w


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("block", [8, 128])
def test_sparsegpt_is_slow_obs_with_exact_inverses(pattern: str, block: int) -> None:
    weight, x = random_layer()
    hessian = 2 * x.T @ x / len(x)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    groups = {"2:4": (2, 4), "4:8": (4, 8)}.get(pattern)
    expected = slow_obs(weight, damped, block, 0.5, groups)
    found = weight.clone()
    _obs.prune(found, hessian, config("sparsegpt", pattern=pattern, block_size=block))
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_sparsegpt_makes_up_for_what_it_takes_out() -> None:
    weight, x = random_layer(columns=64)
    _, factors = random_layer(columns=16)
    x = factors @ x[:16] + x  # inputs that say much the same
    hessian = 2 * x.T @ x / len(x)

    def error(pruned: Any) -> float:
        return float(((pruned - weight) @ x.T).square().mean())

    made_up = weight.clone()
    _obs.prune(made_up, hessian, config("sparsegpt"))
    masked = weight * (made_up != 0)
    smallest = weight * _masks.keep(weight.abs(), config("magnitude"))
    assert error(made_up) < 0.75 * error(masked) and error(made_up) < 0.75 * error(smallest)


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    weight, x = random_layer()
    x[:, 5] = 0
    _obs.prune(weight, x.T @ x, config("sparsegpt"))
    assert bool((weight[:, 5] == 0).all()) and bool(torch.isfinite(weight).all())


def test_a_hessian_that_is_none_is_told_of() -> None:
    with pytest.raises(HpcdlError, match="not positive definite"):
        _obs.prune(torch.rand(2, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), config("sparsegpt"))


# --- a decoder, block by block ---------------------------------------------------------------------------------


def test_each_block_sees_what_the_pruned_blocks_before_it_give() -> None:
    """Statistics of the walk against hooks in the whole model, pruned up to that block by the same method."""
    model, batches = tiny(), text()
    seen: list[Any] = []

    def note(layer: Any, norms: _layerwise.SquaredNorms) -> None:
        seen.append(norms.sums.clone())
        _masks.take_out(layer, _masks.keep(layer.weight.detach().abs(), config("magnitude")))

    _layerwise.in_order(model, batches, _layerwise.SquaredNorms, note)
    last = trunk(model).layers[1]
    expected = torch.zeros(64, dtype=torch.float64)
    dense = tiny()
    for name, layer in _masks.linears(dense).items():  # pruned up to the last matrix's inputs
        if "layers.0." in name:
            layer.weight.data = _masks.linears(model)[name].weight.data

    def note_again(_: Any, inputs: Any) -> None:
        expected.add_(inputs[0].double().square().sum((0, 1)))

    hook = trunk(dense).layers[1].mlp.down_proj.register_forward_pre_hook(note_again)
    with torch.no_grad():
        for batch in batches:
            # with a cache transformers takes a row for one document
            dense(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    hook.remove()
    assert len(seen) == 14 and last.mlp.down_proj.in_features == 64
    torch.testing.assert_close(seen[-1], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_a_model_has_its_zeros_where_they_belong(name: str, pattern: str) -> None:
    model, dense = tiny(), tiny()
    prune.get(name).apply(config(name, pattern=pattern), model, text())
    layers = _masks.linears(model)
    assert len(layers) == 14 and all(".layers." in layer for layer in layers)
    for layer in layers.values():
        zeros = layer.weight == 0
        assert zeros.float().mean() == 0.5
        if pattern != "unstructured":
            taken, group = map(int, pattern.split(":"))
            assert (zeros.view(-1, group).sum(-1) == taken).all()
        if name == "wanda":
            assert (zeros.sum(1) == zeros.shape[1] // 2).all()
    for (key, after), before in zip(model.named_parameters(), dense.parameters(), strict=True):
        if key.removesuffix(".weight") not in layers:
            assert torch.equal(after, before)
        elif name != "sparsegpt":
            assert torch.equal(after, before * (after != 0))
    assert model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["magnitude", "obd"])
def test_global_pruning_compares_all_matrices(name: str) -> None:
    model = tiny()
    with torch.no_grad():
        trunk(model).layers[0].mlp.up_proj.weight.mul_(0.05)
    prune.get(name).apply(config(name, scope="global", sparsity=0.3), model, text())
    shares = {key: float((layer.weight == 0).float().mean()) for key, layer in _masks.linears(model).items()}
    assert _masks.sparsity(_masks.linears(model)) == pytest.approx(0.3, abs=1e-4)
    assert len(set(shares.values())) > 5
    if name == "magnitude":
        assert shares["model.layers.0.mlp.up_proj"] > 0.9


# --- OBD's estimates on a Transformer ----------------------------------------------------------------------------


def exact_gauss_newton(model: Any, batches: list[Any], weight: Any) -> Any:
    """Mean over tokens of Σ_c p_c (∂ log p_c / ∂w)²: every label of every token, a backward pass each."""
    found, tokens = torch.zeros_like(weight), 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        log_p = logits.log_softmax(-1)
        for t in range(len(log_p)):
            tokens += 1
            for c in range(log_p.shape[1]):
                (g,) = torch.autograd.grad(log_p[t, c], weight, retain_graph=True)
                found += log_p[t, c].detach().exp() * g**2
    return found / tokens


def small() -> tuple[Any, list[Any]]:
    """Few labels, so that every one of them can have a backward pass."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, vocab_size=30, max_position_embeddings=32, tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.ndim == 2 else 1)  # predictions that aren't all alike
    batches = [{name: t % 30 if name != "real" else t for name, t in batch.items()} for batch in text(2, 6)]
    return model, batches


@pytest.mark.parametrize("how", ["gauss_newton", "fisher", "hutchinson"])
def test_estimates_on_text_converge(how: str) -> None:
    model, batches = small()
    name = "model.layers.0.mlp.down_proj"
    layer = _masks.linears(model)[name]
    if how == "gauss_newton":
        expected = exact_gauss_newton(model, batches, layer.weight)
    elif how == "fisher":
        expected, tokens = torch.zeros_like(layer.weight), 0
        for batch in batches:
            log_p = (
                model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
                .logits[0]
                .log_softmax(-1)
            )
            for t, label in enumerate(batch["labels"][0].tolist()):
                tokens += 1
                expected += torch.autograd.grad(log_p[t, label], layer.weight, retain_graph=True)[0] ** 2
        expected /= tokens
    else:
        original = layer.weight.detach().clone()

        def objective(weight: Any) -> Any:
            state = {f"{name}.weight": weight}
            losses = []
            for batch in batches:
                arguments = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
                logits = torch.func.functional_call(model, state, (), arguments).logits[0]
                losses.append(torch.nn.functional.cross_entropy(logits, batch["labels"][0]))
            return sum(losses) / len(losses)

        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.MATH):
            whole = torch.autograd.functional.hessian(objective, original)
        expected = whole.reshape(original.numel(), -1).diagonal().view_as(original)
    found = _language.diagonal(model, {name: layer}, batches, how, 800)[name]
    assert (found - expected).norm() < 0.15 * expected.norm()
    assert all(p.requires_grad for p in model.parameters())


def test_drawn_tokens_have_the_models_chances() -> None:
    hidden, head = torch.zeros(20_000, 2), torch.zeros(3, 2)
    hidden[:, 0], head[:, 0] = 1.0, torch.tensor([0.0, 1.0, 2.0])
    drawn = _language.draw(hidden, head, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(share, head[:, 0].softmax(0), atol=0.015, rtol=0)


# --- before submission ---------------------------------------------------------------------------------------


def faults(**dotted: Any) -> list[Fault]:
    spec = tiny_spec(**dotted)
    return list(prune.get(spec.prune.name).check(spec.prune, spec))


@pytest.mark.parametrize("name", METHODS)
def test_pruning_is_taken(name: str) -> None:
    assert faults(prune__name=name) == []
    assert faults(prune__name=name, prune__pattern="2:4", peft__name="lora") == []
    assert faults(prune__name=name, parallel__tp=2, cluster__processes_per_node=2) == []


@pytest.mark.parametrize(
    ("changes", "key", "problem", "fix"),
    [
        ({"sparsity": 0.6, "pattern": "2:4"}, "prune.sparsity", "2 zeros among 4", "prune.sparsity=0.5"),
        ({"pattern": "4:8", "scope": "global"}, "prune.scope", "each group of 8", "prune.scope=layer"),
        ({"name": "sparsegpt", "scope": "global"}, "prune.scope", "from block to block", "prune.scope=layer"),
        (
            {"name": "sparsegpt", "pattern": "2:4", "block_size": 6},
            "prune.block_size", "whole groups", "prune.block_size=8",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_refused(changes: dict[str, Any], key: str, problem: str, fix: str) -> None:
    (fault,) = faults(**{f"prune__{k}": v for k, v in {"name": "magnitude", **changes}.items()})
    assert fault.key == key and problem in fault.problem and fault.fix == fix


def test_rows_and_ranks_that_cannot_be_are_refused() -> None:
    (fault,) = faults(prune__name="magnitude", prune__pattern="4:8", model__shape__intermediate_size=60)
    assert fault.key == "prune.pattern" and "rows of 60" in fault.problem
    (fault,) = faults(
        prune__name="magnitude", peft__name="lora", parallel__tp=2, cluster__processes_per_node=2
    )
    assert "tensor parallel" in fault.problem and fault.fix == "parallel.tp=1"
    (fault,) = faults(prune__name="magnitude", quant__scheme="int8")
    assert "the rounding of quant=int8" in fault.problem and fault.fix == "quant=none"


@pytest.mark.parametrize("name", METHODS)
def test_memory_is_told_in_closed_form(name: str) -> None:
    spec = tiny_spec(prune__name=name)
    told = prune.get(name).memory(spec.prune, spec)
    matrices = [layer.weight.numel() for layer in _masks.linears(tiny()).values()]
    assert told["masks"] == max(matrices)
    if name == "obd":
        assert told["hessian_diagonal"] == 4 * sum(matrices)
    if name == "sparsegpt":
        assert told["hessians"] == 4 * (6 * 32**2 + 64**2)
