"""4-bit matrices: bitsandbytes' bytes, the layers over them, the loss of a held head."""

from __future__ import annotations

from typing import Any

import pytest

from hpcdl.errors import HpcdlError

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.torch

KINDS = ("nf4", "fp4")


def matrices() -> dict[str, Any]:
    """Random ones, and what a table or a kernel might stumble over."""
    made = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=made)

    zeros = normal(64, 128)
    zeros[::3] = 0
    zeros[5, :64] = 0
    zeros[7, 0] = -3 * zeros[7].abs().max()
    edges = torch.zeros(8, 64)
    edges[1, 3], edges[2, 2], edges[3], edges[4] = -0.0, 1e-40, 3.0, -3.0
    return {
        "usual": normal(96, 256) * 0.02,
        "blocks of 32": normal(33, 96),
        "zeros": zeros,
        "edges": edges,
        "every magnitude": normal(64, 128) * torch.logspace(-30, 30, 64)[:, None],
        "magnitudes mixed in a block": normal(64, 128)
        * 10.0 ** torch.randint(-12, 1, (64, 128), generator=made),
        "on boundaries": normal(5000, 64).round(),  # more blocks than are taken at a time
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("name", matrices())
def test_bytes_and_values_are_those_of_bitsandbytes(name: str, dtype: str, kind: str) -> None:
    from hpcdl.compress.quant import _blocks4

    _blocks4.ops()
    import bitsandbytes.functional as theirs

    weight = matrices()[name].to(getattr(torch, dtype))
    if not torch.isfinite(weight).all():
        weight = weight.nan_to_num(posinf=0, neginf=0)
    digits, state = theirs.quantize_4bit(
        weight, blocksize=_blocks4.block_size(weight.shape[1]), compress_statistics=True, quant_type=kind
    )
    packed = _blocks4.pack(weight, kind)
    assert torch.equal(packed["weight"].flatten(), digits.flatten())
    assert torch.equal(packed["absmax"], state.absmax)
    assert torch.equal(packed["scales"], state.state2.absmax)
    assert torch.equal(packed["offset"], state.offset)
    shapes = _blocks4.packed_shapes(*weight.shape)
    assert {key: (tuple(t.shape), t.dtype) for key, t in packed.items()} == shapes

    held = (_blocks4.Nf4 if kind == "nf4" else _blocks4.Fp4)(*weight.shape, packed)
    expected = theirs.dequantize_4bit(digits, state)
    assert torch.equal(held.whole(weight.dtype), expected)
    parts = [held.rows(first, last, weight.dtype) for first, last in held.slices(weight.shape[1] * 2)]
    assert torch.equal(torch.cat(parts), expected)
    ids = torch.tensor([[2, 1], [0, 3]])
    assert torch.equal(held.pick(ids, weight.dtype), expected[ids])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_numbers_that_are_none_are_refused(value: float, dtype: str) -> None:
    from hpcdl.compress.quant import _hold

    weight = torch.randn(8, 64).to(getattr(torch, dtype))
    weight[3, 5] = value
    for kind in _hold.KINDS:
        with pytest.raises(HpcdlError, match="infinite or no numbers"):
            _hold.pack_as(kind, weight)


def test_rows_that_make_no_blocks_are_refused() -> None:
    from hpcdl.compress.quant import _blocks4

    with pytest.raises(HpcdlError, match="48 columns makes no whole 4-bit blocks: no multiple of 32"):
        _blocks4.pack(torch.randn(4, 48), "nf4")


def test_int8_rows_are_within_half_a_step() -> None:
    from hpcdl.compress.quant import _hold

    weight = torch.randn(50, 96)
    weight[7] = 0
    packed = _hold.pack_as("int8", weight)
    held = _hold.from_tensors("int8", (50, 96), packed)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((held.whole(torch.float32) - weight).abs() <= 0.5001 * step).all()
    assert torch.equal(held.whole(torch.float32)[7], torch.zeros(96))


# --- the layers ----------------------------------------------------------------------------------------------


def held_layer(kind: str = "nf4", rows: int = 96, columns: int = 64, bias: bool = False) -> tuple[Any, Any]:
    """A held layer, and a plain one with the very same weights."""
    from hpcdl.compress.quant import _hold
    from hpcdl.distributed.held import HeldLinear

    torch.manual_seed(1)
    plain = torch.nn.Linear(columns, rows, bias=bias)
    matrix = _hold.from_tensors(kind, (rows, columns), _hold.pack_as(kind, plain.weight))
    plain.weight.data = matrix.whole(torch.float32)
    return HeldLinear(matrix, plain.bias), plain


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("in_parts", [False, True])
def test_a_held_layer_is_the_plain_one(
    kind: str, bias: bool, in_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpcdl.distributed import held

    layer, plain = held_layer(kind, rows=1024, bias=bias)
    if in_parts:
        monkeypatch.setattr(held.Matrix.slices, "__defaults__", (64 * 300,))
        assert len(list(layer.matrix.slices())) > 1
    x = torch.randn(2, 5, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = layer(x), plain(y)
    assert torch.allclose(out, expected, atol=1e-6)
    pull = torch.randn_like(out)
    out.backward(pull)
    expected.backward(pull)
    assert torch.allclose(x.grad, y.grad, atol=1e-5)
    assert all(p.grad is None for p in layer.parameters())


def test_nothing_whole_is_kept_for_the_backward_pass() -> None:
    layer, _ = held_layer()
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 64, requires_grad=True)).sum()
    assert kept == []


def test_autocast_computes_in_its_dtype() -> None:
    layer, _ = held_layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16


def test_a_matrix_counts_as_what_it_stands_for() -> None:
    from hpcdl.distributed.held import HeldEmbedding, parameter_count

    layer, plain = held_layer(bias=True)
    assert parameter_count(layer) == parameter_count(plain)
    tied = torch.nn.ModuleList([layer, HeldEmbedding(layer.matrix, None, torch.float32)])
    assert parameter_count(tied) == parameter_count(plain)


# --- the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_the_loss_of_a_held_head_is_the_plain_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpcdl.distributed import losses

    layer, plain = held_layer(kind, rows=1500)
    # several parts of the vocabulary and several of the tokens, the last ones smaller
    monkeypatch.setitem(losses.HELD_WEIGHTS, "cpu", 64 * 512)
    monkeypatch.setitem(losses.CHUNK_LOGITS, "cpu", 64 * 512)
    hidden = (4 * torch.randn(3, 50, 64)).requires_grad_()
    labels = torch.randint(0, 1500, (3, 50))
    labels[0, :7] = losses.IGNORE
    found = losses.linear_cross_entropy(hidden, layer.matrix, labels)
    found.backward()
    gradient, hidden.grad = hidden.grad, None
    logits = plain(hidden).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(
        logits, labels.flatten(), ignore_index=losses.IGNORE, reduction="sum"
    )
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(gradient, hidden.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert losses.linear_cross_entropy(hidden, layer.matrix, labels).item() == found.item()
    with torch.autocast("cpu", torch.bfloat16):
        assert losses.linear_cross_entropy(hidden, layer.matrix, labels).item() == pytest.approx(
            expected.item(), rel=1e-2
        )
