"""Rounding that knows the layer's inputs: a column's error is made up for by the columns that are still to come.

Round-to-nearest takes each weight for itself. What matters is the layer's output: with H = E[x·xᵀ] over the text
that goes through it, an error δ in the matrix costs δ·H·δᵀ. Columns are rounded one after the other, those with
the greatest inputs first; after each, all that are left move so as to make up for its error as well as they can.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
ICLR 2023, section 3 and algorithm 1, with groups fixed beforehand and the order of their implementation's
«act-order». The scale of each group is first searched over smaller ranges than the weights', for the least error
weighted by diag(H): Lin et al., "AWQ: Activation-aware Weight Quantization", MLSys 2024, section 3.2 (clipping).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpcdl.compress.quant import _affine
from hpcdl.distributed.decoder import blocks, trunk

DAMPING = 0.01
"""Part of H's mean diagonal that is added to it, as in the paper."""
BLOCK = 128
"""Columns whose errors are passed on together, as in the paper."""
SHRINKS = tuple(1 - step / 20 for step in range(9))
"""Ranges that are tried for each group, as a part of the whole range."""

Round = Callable[[str, nn.Linear, Tensor], nn.Module]
"""Name of a layer, the layer and its H `(in_features, in_features)` → what takes its place."""


def rounded4(weight: Tensor, hessian: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """int4 for the least error of the layer's output.

    Args:
        weight: `(rows, columns)`.
        hessian: E[x·xᵀ] of the inputs, `(columns, columns)` fp32.
        group: columns that share a scale.

    Returns:
        Levels `(rows, columns)` uint8, scales `(rows, groups)` bf16, zero points `(rows, groups)` uint8.
    """
    left, hessian = weight.float().clone(), hessian.clone()
    inputs = hessian.diagonal()
    silent = inputs == 0  # nothing ever comes in there
    inputs[silent] = 1
    left[:, silent] = 0
    scale, zero = searched4(left, inputs, group)
    inputs += DAMPING * inputs.mean()
    order = inputs.argsort(descending=True)
    factor = _factor(hessian[order][:, order])
    scales, zeros = (t.float().repeat_interleave(group, 1)[:, order] for t in (scale, zero))
    left = left[:, order]
    levels = torch.empty_like(left)
    for first in range(0, left.shape[1], BLOCK):
        some = slice(first, first + BLOCK)
        errors = _round_block(
            left[:, some], scales[:, some], zeros[:, some], factor[some, some], levels[:, some]
        )
        left[:, first + BLOCK :] -= errors @ factor[some, first + BLOCK :]
    return levels[:, order.argsort()].to(torch.uint8), scale, zero


def _factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of H⁻¹: its rows say how much each later column makes up for (step 2 of the paper)."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _round_block(left: Tensor, scales: Tensor, zeros: Tensor, factor: Tensor, levels: Tensor) -> Tensor:
    """Rounds the columns of `left` one by one into `levels`; returns each one's error, scaled for those after."""
    errors = torch.empty_like(left)
    for column in range(left.shape[1]):
        weight, scale, zero = left[:, column], scales[:, column], zeros[:, column]
        level = ((weight / scale).round() + zero).clamp(0, _affine.LEVELS)
        error = (weight - (level - zero) * scale) / factor[column, column]
        left[:, column:] -= error[:, None] * factor[column, column:]
        levels[:, column], errors[:, column] = level, error
    return errors


def searched4(weight: Tensor, inputs: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points, each group's with the range that makes its weighted error least.

    Args:
        weight: `(rows, columns)`.
        inputs: mean square of each column's input, `(columns,)`.
        group: columns that share a scale.
    """
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for shrink in SHRINKS:
        scale, zero = _affine.groups4(weight, group, shrink)
        level = _affine.nearest4(weight, scale, zero)
        wrong = (_affine.from_levels4(level, scale, zero, torch.float32) - weight).square_() * inputs
        error = wrong.view(*scale.shape, group).sum(-1)
        if best is None:
            best = error, scale, zero
            continue
        better = error < best[0]
        new = zip((error, scale, zero), best, strict=True)
        best = tuple(torch.where(better, mine, theirs) for mine, theirs in new)  # type: ignore[assignment]
    assert best is not None
    return best[1], best[2]


class _Enough(Exception):
    """The inputs of the first block are known."""


@torch.no_grad()
def block_by_block(model: Any, batches: Sequence[dict[str, Tensor]], round_layer: Round) -> None:
    """Replaces the linear layers of every block, in order, each with the inputs that it will really have.

    Those are what the blocks before it give once they are rounded. One block's matrices H are held at a time.

    Args:
        model: transformers' causal model; its blocks' layers are replaced in place.
        batches: `input_ids` and `position_ids`, each `(rows, seq_len)`.
        round_layer: makes what takes a layer's place.
    """
    was_training = model.training
    model.eval()
    calls = list(_first_inputs(model, batches))
    for block in blocks(model):
        with _measured(block) as hessians:
            for arguments, named in calls:
                block(*arguments, **named)
        for name, hessian in hessians().items():
            parent, _, leaf = name.rpartition(".")
            layer: Any = block.get_submodule(name)
            setattr(block.get_submodule(parent), leaf, round_layer(name, layer, hessian))
        calls = [((_states(block(*arguments, **named)), *arguments[1:]), named) for arguments, named in calls]
    model.train(was_training)


def _states(out: Any) -> Tensor:
    """Hidden states from what a block gives: alone, or first of a tuple."""
    states: Tensor = out[0] if isinstance(out, tuple) else out
    return states


def _first_inputs(
    model: Any, batches: Sequence[dict[str, Tensor]]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the first block is called with, for each batch."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append((arguments, named))
        raise _Enough

    handle = blocks(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in batches:
            try:
                trunk(model)(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
            except _Enough:
                yield seen.pop()
    finally:
        handle.remove()


@contextmanager
def _measured(block: nn.Module) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Adds up x·xᵀ of every linear layer's inputs; layers that are given the same tensor share the sum."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    twin: dict[str, str] = {}
    last: list[Any] = [None, ""]

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0] is last[0]:
                twin[name] = last[1]
                return
            last[:] = inputs[0], name
            states = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            rows[name] = rows.get(name, 0) + len(states)
            sums[name] = torch.addmm(sums[name], states.T, states) if name in sums else states.T @ states

        return hook

    linear = [(name, layer) for name, layer in block.named_modules() if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in linear]
    try:
        yield lambda: {name: sums[twin.get(name, name)] / rows[twin.get(name, name)] for name, _ in linear}
    finally:
        for handle in handles:
            handle.remove()
