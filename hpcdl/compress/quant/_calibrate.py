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

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hpcdl.compress.prune._layerwise import Hessian, in_order
from hpcdl.compress.prune._obs import inverse_factor
from hpcdl.compress.quant import _affine
from hpcdl.compress.quant._hold import linears
from hpcdl.compress.quant._integer import check
from hpcdl.errors import HpcdlError

DAMPING = 0.01
"""Part of H's mean diagonal that is added to it, as in the paper."""
BLOCK = 128
"""Columns whose errors are passed on together, as in the paper."""
SHRINKS = tuple(1 - step / 20 for step in range(9))
"""Ranges that are tried for each group, as a part of the whole range."""


def rounded4(weight: Tensor, hessian: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """int4 for the least error of the layer's output. Weights that are zero (pruned) stay so.

    Args:
        weight: `(rows, columns)`.
        hessian: E[x·xᵀ] of the inputs up to a factor, `(columns, columns)` fp32.
        group: columns that share a scale.

    Raises:
        HpcdlError: H is not positive definite.

    Returns:
        Levels `(rows, columns)` uint8, scales `(rows, groups)` bf16, zero points `(rows, groups)` uint8.
    """
    left = weight.float().clone()
    inputs = hessian.diagonal()
    left[:, inputs == 0] = 0  # nothing ever comes in there
    scale, zero = searched4(left, inputs, group)
    order = inputs.argsort(descending=True)
    try:
        factor, _ = inverse_factor(hessian[order][:, order], DAMPING)
    except HpcdlError as error:
        raise HpcdlError("its inputs say too little of it: more quant.calibration_samples") from error
    factor = factor.to(left.dtype)
    scales, zeros = (t.float().repeat_interleave(group, 1)[:, order] for t in (scale, zero))
    left, kept = left[:, order], (left != 0)[:, order]
    levels = torch.empty_like(left)
    for first in range(0, left.shape[1], BLOCK):
        some = slice(first, first + BLOCK)
        errors = _round_block(
            left[:, some], kept[:, some], scales[:, some], zeros[:, some], factor[some, some], levels[:, some]
        )
        left[:, first + BLOCK :] -= errors @ factor[some, first + BLOCK :]
    return levels[:, order.argsort()].to(torch.uint8), scale, zero


def _round_block(
    left: Tensor, kept: Tensor, scales: Tensor, zeros: Tensor, factor: Tensor, levels: Tensor
) -> Tensor:
    """Rounds the columns of `left` one by one into `levels`; returns each one's error, scaled for those after."""
    errors = torch.empty_like(left)
    for column in range(left.shape[1]):
        weight, scale, zero = left[:, column], scales[:, column], zeros[:, column]
        level = ((weight * kept[:, column] / scale).round() + zero).clamp(0, _affine.LEVELS)
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


def calibrate4(
    model: nn.Module, text: Sequence[Mapping[str, Tensor]], group: int, told: Callable[[str], None]
) -> dict[str, dict[str, Tensor]]:
    """int4 for every linear layer of the blocks, each with the inputs that the rounded blocks before it give.

    Args:
        model: transformers' causal language model, whole; its weights become what int4 makes of them.
        text: calibration batches, as for pruning (hpcdl.compress.prune).
        group: columns that share a scale.
        told: hears the name of each layer that is done.

    Returns:
        The tensors of `hpcdl.compress.quant._integer.Int4` by the layer's name.

    Raises:
        HpcdlError: there is no text, the model can't be gone through block by block, or a matrix can't be held so.
    """
    names = {layer: name for name, layer in linears(model)}
    found: dict[str, dict[str, Tensor]] = {}

    def round_layer(layer: nn.Linear, seen: Hessian) -> None:
        name = names[layer]
        try:
            check(layer.weight, group)
            level, scale, zero = rounded4(layer.weight, seen.hessian, group)
        except HpcdlError as error:
            raise HpcdlError(f"{name}: {error}") from error
        layer.weight.copy_(_affine.from_levels4(level, scale, zero, layer.weight.dtype))
        packed = {"weight": _affine.pack4(level), "scale": scale, "zero": zero}
        found[name] = {key: tensor.cpu() for key, tensor in packed.items()}
        told(name)

    in_order(model, text, Hessian, round_layer)
    return found
