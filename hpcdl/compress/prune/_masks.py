"""Masks from scores: which weights stay. Torch side, imported inside functions only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hpcdl.compress.prune._common import GROUPS, PatternConfig
from hpcdl.distributed.decoder import blocks
from hpcdl.errors import HpcdlError

DIGIT = 11
"""Bits of a score that are looked at in one pass."""


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder's blocks by name: not the embedding, the head and the norms."""
    inside = blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is inside)
    return {
        f"{prefix}.{name}": module for name, module in inside.named_modules() if isinstance(module, nn.Linear)
    }


def prune_by(
    config: PatternConfig, layers: Mapping[str, nn.Linear], score: Callable[[str, nn.Linear], Tensor]
) -> None:
    """Takes out the weights with the lowest scores, of each matrix or of all together.

    Args:
        config: how many, and where.
        layers: by name.
        score: a layer's scores, `(rows, columns)`, all at least 0.
    """
    if config.scope == "global" and config.pattern not in GROUPS:
        scores = [score(name, layer) for name, layer in layers.items()]
        count = to_take(sum(s.numel() for s in scores), config.sparsity)
        for layer, kept in zip(layers.values(), all_but_smallest(scores, count), strict=True):
            take_out(layer, kept)
        return
    for name, layer in layers.items():
        take_out(layer, keep(score(name, layer), config))


def keep(scores: Tensor, config: PatternConfig) -> Tensor:
    """Which weights of one matrix stay, bool `(rows, columns)`.

    Args:
        scores: `(rows, columns)`, all at least 0; the lowest go.
        config: the pattern; `scope=row` compares within rows.

    Raises:
        HpcdlError: a row doesn't divide into the pattern's groups.
    """
    if config.pattern in GROUPS:
        return keep_in_groups(scores, *GROUPS[config.pattern])
    if str(config.scope) == "row":
        return keep_in_rows(scores, config.sparsity)
    (kept,) = all_but_smallest([scores], to_take(scores.numel(), config.sparsity))
    return kept


def to_take(weights: int, sparsity: float) -> int:
    """How many of so many weights are taken out: never more than the share that was asked for."""
    return math.floor(weights * sparsity + 1e-9)


def keep_in_rows(scores: Tensor, sparsity: float) -> Tensor:
    """All but the lowest share of each row."""
    kept = torch.ones_like(scores, dtype=torch.bool)
    lowest = scores.topk(to_take(scores.shape[1], sparsity), dim=1, largest=False).indices
    return kept.scatter_(1, lowest, False)


def keep_in_groups(scores: Tensor, zeros: int, group: int) -> Tensor:
    """All but the `zeros` lowest of every `group` neighbours of a row.

    Raises:
        HpcdlError: a row doesn't divide into groups.
    """
    rows, columns = scores.shape
    if columns % group:
        raise HpcdlError(f"prune.pattern={zeros}:{group}: a row of {columns} weights has no whole groups")
    grouped = scores.reshape(rows, columns // group, group)
    lowest = grouped.topk(zeros, dim=2, largest=False).indices
    kept = torch.ones_like(grouped, dtype=torch.bool)
    return kept.scatter_(2, lowest, False).reshape(rows, columns)


def all_but_smallest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """All but the `count` smallest elements of all tensors together; of equal ones the first go.

    The threshold is found a few bits at a time (floats of one sign are ordered as their bits are): exact, and
    no copy or sort of all of them, which for a model's weights would take several times their memory.

    Args:
        scores: at least 0, no NaN.
        count: how many.

    Returns:
        bool, of the same shapes.
    """
    for score in scores:
        if not bool(torch.isfinite(score).all()) or bool((score < 0).any()):
            raise HpcdlError(
                "a pruning score is negative or no number: are the weights and the calibration data sound?"
            )
    if count <= 0:
        return [torch.ones_like(score, dtype=torch.bool) for score in scores]
    wide = any(score.dtype == torch.float64 for score in scores)
    real, whole, width = (torch.float64, torch.int64, 63) if wide else (torch.float32, torch.int32, 31)
    ordered = [(score.to(real) + 0.0).view(whole) for score in scores]
    threshold, below = _threshold(ordered, count, width)
    kept = [values >= threshold for values in ordered]
    left = count - below
    for values, mask in zip(ordered, kept, strict=True):
        equal = (values == threshold).flatten().nonzero().flatten()[:left]
        mask.view(-1)[equal] = False
        left -= len(equal)
    return kept


def _threshold(ordered: Sequence[Tensor], count: int, width: int) -> tuple[int, int]:
    """The `count`-th smallest of all values, and how many are smaller.

    Args:
        ordered: whole numbers of `width` bits, at least 0.
        count: at least 1, at most as many as there are.
        width: bits.
    """
    prefix, below, left = 0, 0, width
    while left:
        step = min(DIGIT, left)
        left -= step
        digits = torch.zeros(1 << step, dtype=torch.int64)
        for values in ordered:
            here = values.flatten() >> left
            if left + step < width:
                here = here[here >> step == prefix]
            digits += torch.bincount(here & ((1 << step) - 1), minlength=1 << step).cpu()
        cumulated = digits.cumsum(0)
        digit = int((cumulated < count - below).sum())
        below += int(cumulated[digit] - digits[digit])
        prefix = prefix << step | digit
    return prefix, below


@torch.no_grad()
def take_out(layer: nn.Linear, kept: Tensor) -> None:
    """Sets a layer's weights to zero where they are not kept."""
    layer.weight.masked_fill_(~kept.to(layer.weight.device), 0.0)


def sparsity(layers: Mapping[str, nn.Linear]) -> float:
    """Share of zeros among the weights of these layers."""
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers.values())
    return zeros / max(1, sum(layer.weight.numel() for layer in layers.values()))
