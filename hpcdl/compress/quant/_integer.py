"""Matrices of whole numbers times scales (hpcdl.compress.quant._affine), and the layers that use them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hpcdl.compress.quant import _affine
from hpcdl.compress.quant._rows8 import Rows8
from hpcdl.distributed.held import HeldLinear, Matrix
from hpcdl.errors import HpcdlError

FEW = 16
"""Rows up to which torch's own kernel for int8 weights is quicker than casting them (bf16 on a CPU)."""
LEAST_ROWS_ON_CUDA = 17
"""torch._int_mm wants as many there."""


def check(weight: Tensor, group: int) -> None:
    """Whether int4 can hold a matrix.

    Raises:
        HpcdlError: a row makes no whole groups, or a weight is not finite.
    """
    if weight.shape[1] % group:
        raise HpcdlError(f"a matrix of {weight.shape[1]} columns makes no whole groups of {group}")
    if not torch.isfinite(weight.sum(dtype=torch.float32)):
        raise HpcdlError("some of its numbers are infinite or no numbers at all")


def pack4(weight: Tensor, group: int) -> dict[str, Tensor]:
    """A matrix `(rows, columns)` → the tensors of `Int4`, each weight rounded to the nearest.

    Raises:
        HpcdlError: a row makes no whole groups, or a weight is not finite.
    """
    check(weight, group)
    scale, zero = _affine.groups4(weight, group)
    return {"weight": _affine.pack4(_affine.nearest4(weight, scale, zero)), "scale": scale, "zero": zero}


class Int4(Matrix):
    """Two columns a byte; a scale and a zero point a group of columns: 4.38 bits a weight in groups of 64."""

    kind = "int4"
    packed = ("weight", "scale", "zero")
    scale: Tensor
    """`(rows, groups)` bf16."""
    zero: Tensor
    """`(rows, groups)` uint8."""

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows `first … last - 1` in `dtype`."""
        return self._levels(slice(first, last), dtype)

    def pick(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows `ids` in `dtype`."""
        return self._levels(ids.flatten(), dtype).view(*ids.shape, self.in_features)

    def _levels(self, which: Any, dtype: torch.dtype) -> Tensor:
        return _affine.whole4(self.weight[which], self.scale[which], self.zero[which], dtype)


class Int8Linear(HeldLinear):
    """Input and products in floating point; a row's scale is applied to the product: no matrix is made whole."""

    matrix: Rows8

    def forward(self, input: Tensor) -> Tensor:
        """In autocast's dtype, or the input's."""
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        flat = self.product(input.reshape(-1, self.in_features), self.matrix.weight, self.matrix.scale)
        out = flat.view(*input.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @staticmethod
    def product(rows: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
        """`(rows, in_features)` → `(rows, out_features)`."""
        result: Tensor = _Product8.apply(rows, levels, scale)  # type: ignore[no-untyped-call]
        return result


class Int8DynamicLinear(Int8Linear):
    """The input is rounded to int8 too, a scale a token as it comes: products are of whole numbers."""

    @staticmethod
    def product(rows: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
        """`(rows, in_features)` → `(rows, out_features)`."""
        result: Tensor = _ProductDynamic8.apply(rows, levels, scale)  # type: ignore[no-untyped-call]
        return result


def rows8(kind: type[Int8Linear], linear: nn.Linear, packed: Mapping[str, Tensor]) -> Int8Linear:
    """A layer of this kind in the place of `linear`, over what `_rows8.pack` gave."""
    return kind(Rows8(linear.out_features, linear.in_features, packed), linear.bias)


class _Product8(torch.autograd.Function):
    """(rows @ levels.T) · scale."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
        """`(rows, out_features)`."""
        ctx.save_for_backward(levels, scale)
        if rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and len(rows) <= FEW:
            return torch._weight_int8pack_mm(rows.contiguous(), levels, scale.to(rows.dtype))
        return (rows @ levels.to(rows.dtype).T) * scale.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The input's gradient."""
        levels, scale = ctx.saved_tensors
        return (grad * scale.to(grad.dtype)) @ levels.to(grad.dtype), None, None


class _ProductDynamic8(torch.autograd.Function):
    """int8(rows) @ levels.T · scale · tokens' scales; backward as if the rows hadn't been rounded."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
        """`(rows, out_features)`."""
        ctx.save_for_backward(levels, scale)
        rounded, tokens = _affine.tokens8(rows)
        return (_product_of_integers(rounded, levels) * tokens * scale).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The input's gradient, straight through the rounding."""
        levels, scale = ctx.saved_tensors
        return (grad * scale.to(grad.dtype)) @ levels.to(grad.dtype), None, None


def _product_of_integers(rows: Tensor, levels: Tensor) -> Tensor:
    """`rows @ levels.T` of int8, `(rows, out_features)` int32."""
    if rows.device.type == "cuda" and len(rows) < LEAST_ROWS_ON_CUDA:
        padded = nn.functional.pad(rows, (0, 0, 0, LEAST_ROWS_ON_CUDA - len(rows)))
        return torch._int_mm(padded, levels.T)[: len(rows)]
    return torch._int_mm(rows, levels.T)
