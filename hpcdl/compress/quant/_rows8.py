"""Matrices in 8-bit whole numbers with a scale a row: for embeddings and heads, and whatever needs nothing more.

A row's scale is its largest magnitude over 127: 8 bits a weight and 32 a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpcdl.distributed.held import Matrix
from hpcdl.errors import HpcdlError

CHUNK = 2**22
"""Weights that are rounded at a time."""


class Rows8(Matrix):
    """A matrix of int8 numbers; row i stands for `weight[i] * scale[i]`."""

    kind = "int8"
    packed = ("weight", "scale")
    scale: Tensor

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Multiplied in fp32, then rounded to `dtype`."""
        return (self.weight[first:last] * self.scale[first:last, None]).to(dtype)

    def pick(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The same for any rows."""
        return (self.weight[ids] * self.scale[ids][..., None]).to(dtype)


def pack(weight: Tensor) -> dict[str, Tensor]:
    """A matrix `(rows, columns)` in 16 or 32 bits → the tensors of `Rows8`.

    Raises:
        HpcdlError: a weight is not finite.
    """
    weight = weight.detach()
    digits = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = weight.abs().amax(1).float() / 127
    if not torch.isfinite(scale).all():
        raise HpcdlError("some of its numbers are infinite or no numbers at all")
    inverse = torch.where(scale > 0, 1 / scale, 0)
    step = max(1, CHUNK // weight.shape[1])
    for at in range(0, len(weight), step):
        digits[at : at + step] = (weight[at : at + step] * inverse[at : at + step, None]).round_()
    return {"weight": digits, "scale": scale}
