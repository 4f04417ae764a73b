"""int4: whole numbers times a scale, and back. Also what turns inputs into int8.

A scale and a zero point a group of columns: w ≈ s·(q - z), q and z in 0 … 15, packed two a byte. Groups are
asymmetric since four bits have no level to waste on a sign that a group doesn't use. Scales are rounded to what
they are kept in *before* weights are divided by them: no error is added by keeping them so.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", CVPR 2018, section 2; the same numbers as torchao's IntxWeightOnlyConfig(int4, PerGroup, ASYMMETRIC)
but for the scales, which are bf16 here.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

TINY = 1e-8
"""Least scale: rows and groups that are all zero have one too."""
LEVELS = 15
"""Highest int4."""


def groups4(weight: Tensor, group: int, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """The scale and the zero point of each group of `group` columns, from its least and greatest weight.

    Args:
        weight: `(rows, columns)`, `columns` a multiple of `group`.
        group: columns that share a scale.
        shrink: part of the range that is kept; what lies beyond it is cut off.

    Returns:
        Scales `(rows, groups)` bf16, and zero points `(rows, groups)` uint8 in 0 … 15.
    """
    grouped = weight.float().reshape(len(weight), -1, group)
    low, high = grouped.amin(-1).clamp_(max=0) * shrink, grouped.amax(-1).clamp_(min=0) * shrink
    scale = ((high - low) / LEVELS).clamp_(min=TINY).to(torch.bfloat16)
    zero = (-low / scale.float()).round_().clamp_(0, LEVELS)
    return scale, zero.to(torch.uint8)


def nearest4(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Each weight's nearest level.

    Args:
        weight: `(rows, columns)`.
        scale: `(rows, groups)`; any float.
        zero: `(rows, groups)`.

    Returns:
        `(rows, columns)` uint8 in 0 … 15.
    """
    return _nearest(weight, scale, zero).to(torch.uint8).flatten(1)


def _nearest(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Levels in fp32, `(rows, groups, group)`."""
    grouped = weight.float().reshape(*scale.shape, -1)
    level = grouped / scale.float().unsqueeze(-1)
    return level.round_().add_(zero.unsqueeze(-1)).clamp_(0, LEVELS)


def from_levels4(level: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """s·(q - z), `(rows, columns)`: the same in bf16 as in fp32 rounded to bf16, as both factors are exact."""
    return _whole(level.reshape(*scale.shape, -1).to(dtype, copy=True), scale, zero)


def _whole(level: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """From levels `(rows, groups, group)` in the dtype of the result; written over."""
    return level.sub_(zero.unsqueeze(-1).to(level.dtype)).mul_(scale.unsqueeze(-1).to(level.dtype)).flatten(1)


def pack4(level: Tensor) -> Tensor:
    """Two levels a byte, the even column in the low half: `(rows, columns)` uint8 → `(rows, columns / 2)` uint8."""
    return level[:, 0::2] | level[:, 1::2] << 4


def unpack4(packed: Tensor) -> Tensor:
    """What `pack4` took: `(rows, columns / 2)` uint8 → `(rows, columns)` uint8 in 0 … 15."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


def whole4(packed: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix `(rows, columns)` that a packed one stands for: both levels of a byte are looked up at once."""
    table = _pairs(dtype, packed.device)
    level = table.index_select(0, packed.reshape(-1).int()).view(dtype)
    return _whole(level.view(*scale.shape, -1), scale, zero)


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two levels of each byte as numbers of `dtype`, `(256,)` in whole numbers twice as wide."""
    byte = torch.arange(256, device=device)
    wide = {2: torch.int32, 4: torch.int64}[dtype.itemsize]
    return torch.stack((byte & 15, byte >> 4), -1).to(dtype).view(wide).flatten()


def rounded4(weight: Tensor, group: int) -> Tensor:
    """What a matrix is after a turn through int4, in its own dtype."""
    scale, zero = groups4(weight, group)
    return _whole(_nearest(weight, scale, zero), scale, zero).to(weight.dtype)


def tokens8(states: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8, a scale a token: `(tokens, width)` → int8, and scales `(tokens, 1)` fp32."""
    scale = (states.abs().amax(-1, keepdim=True).float() / 127).clamp_(min=TINY)
    return (states / scale).round_().clamp_(-127, 127).to(torch.int8), scale
