"""Matrices in blocks of 4-bit numbers, NF4 or FP4: bitsandbytes' format and kernels, made forty times quicker.

64 weights share a scale, their largest magnitude; each becomes the nearest of 16 levels times it. The scales are
held in 8 bits themselves, 256 of them with a scale of their own and an offset for all: 4.13 bits a weight.

Source: Dettmers et al., "QLoRA", NeurIPS 2023, sections 3 and 4; the bytes are those of
`bitsandbytes.functional.quantize_4bit(compress_statistics=True)`.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hpcdl.distributed.held import Matrix
from hpcdl.errors import HpcdlError

BLOCKS = (64, 32)
"""Weights that share a scale: the first that divides a row. (bitsandbytes' CPU kernel reads a last block that is
cut short wrongly.)"""
SCALES = 256
"""Scales that share a scale."""
CHUNK = 4096
"""Blocks that are quantized at a time: what fits the processor's cache."""

# The table of `_from_table`: for each mantissa of a block's scale 2 × 2048 places.
DEPTH = 10
"""Binary orders below the scale that the table tells apart: FP4's smallest boundary is 2^-8.6 of it."""
SIGN = 2048
"""Places for each sign."""


class Blocks4(Matrix):
    """A matrix in 4-bit blocks with doubly quantized scales."""

    packed = ("weight", "absmax", "scales", "offset")
    absmax: Tensor
    scales: Tensor
    offset: Tensor

    def __init__(self, rows: int, columns: int, tensors: Any) -> None:
        super().__init__(rows, columns, tensors)
        self.block = block_size(columns)
        self.step = SCALES // math.gcd(SCALES, columns // self.block)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """By bitsandbytes' kernel; `first` is a multiple of `step`."""
        assert first % self.step == 0
        a_row = self.in_features // self.block
        scales = (
            ops()
            .dequantize_blockwise(
                self.absmax[first * a_row : last * a_row],
                self.scales[first * a_row // SCALES : -(-last * a_row // SCALES)],
                dynamic_map(self.device),
                SCALES,
                torch.float32,
            )
            .add_(self.offset)
        )
        shape = (last - first, self.in_features)
        whole: Tensor = ops().dequantize_4bit(
            self.weight[first:last], scales, self.block, self.kind, shape, dtype
        )
        return whole

    def pick(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows' digits and scales are gathered first."""
        flat = ids.flatten()
        a_row = self.in_features // self.block
        blocks = flat[:, None] * a_row + torch.arange(a_row, device=flat.device)
        codes = dynamic_map(self.device)[self.absmax[blocks].int()]
        scales = codes * self.scales[blocks // SCALES] + self.offset
        shape = (len(flat), self.in_features)
        found: Tensor = ops().dequantize_4bit(
            self.weight[flat], scales.flatten(), self.block, self.kind, shape, dtype
        )
        return found.view(*ids.shape, self.in_features)


class Nf4(Blocks4):
    """16 levels at the quantiles of a normal distribution."""

    kind = "nf4"


class Fp4(Blocks4):
    """Floating point with 2 bits of exponent and one of mantissa."""

    kind = "fp4"


@cache
def ops() -> Any:
    """Bitsandbytes' operations.

    Raises:
        HpcdlError: it isn't installed.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # tells of an optional kernel
    try:
        import bitsandbytes  # noqa: F401  # registers them
    except ImportError as error:
        raise HpcdlError("4-bit weights need bitsandbytes: pip install 'hpcdl[quant]'") from error
    return torch.ops.bitsandbytes


def block_size(columns: int) -> int:
    """Weights of a block.

    Raises:
        HpcdlError: a row makes no whole blocks.
    """
    found = next((size for size in BLOCKS if columns % size == 0), None)
    if found is None:
        raise HpcdlError(
            f"a matrix of {columns} columns makes no whole 4-bit blocks: no multiple of {BLOCKS[-1]}"
        )
    return found


def pack(weight: Tensor, kind: str) -> dict[str, Tensor]:
    """A matrix `(rows, columns)` in 16 or 32 bits → the tensors of `Blocks4`.

    Raises:
        HpcdlError: a row makes no whole blocks, or a weight is not finite.
    """
    rows, columns = weight.shape
    block = block_size(columns)
    if weight.device.type == "cpu":
        digits, absmax = quantize(weight, kind, block)
    else:  # its kernels are quick there
        digits, absmax = ops().quantize_4bit(weight, block, kind, torch.uint8)
    if not torch.isfinite(absmax).all():
        raise HpcdlError("some of its numbers are infinite or no numbers at all")
    offset = absmax.mean()
    codes, scales = ops().quantize_blockwise(absmax - offset, dynamic_map(absmax.device), SCALES)
    return {"weight": digits.view(rows, columns // 2), "absmax": codes, "scales": scales, "offset": offset}


def packed_shapes(rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor that `pack` gives."""
    blocks = rows * columns // block_size(columns)
    return {
        "weight": ((rows, columns // 2), torch.uint8),
        "absmax": ((blocks,), torch.uint8),
        "scales": ((-(-blocks // SCALES),), torch.float32),
        "offset": ((), torch.float32),
    }


def quantize(weight: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """Digits, two a byte, and the scales of the blocks; on the CPU.

    bf16 weights go through a table: what a weight becomes depends on its mantissa, the mantissa of its block's
    scale and the difference of their exponents, half a million cases. Others are compared to the 15 boundaries.

    Returns:
        `(weights / 2,)` uint8, and `(blocks,)` fp32.
    """
    flat = weight.detach().reshape(-1, block)
    digits = torch.empty(len(flat), block // 2, dtype=torch.uint8)
    absmax = torch.empty(len(flat))
    for at in range(0, len(flat), CHUNK):
        part = flat[at : at + CHUNK]
        found = _from_table(part, absmax[at : at + CHUNK], kind) if part.dtype == torch.bfloat16 else None
        if found is None:
            found = _by_comparing(part, absmax[at : at + CHUNK], kind)
        pairs = found.view(torch.int16)  # little-endian: the first of two is the low byte
        digits[at : at + CHUNK] = (pairs << 4).bitwise_or_(pairs >> 8)  # the low byte is kept
    return digits.view(-1), absmax


def _by_comparing(part: Tensor, absmax: Tensor, kind: str) -> Tensor:
    """How many boundaries a weight over its scale is above; `(blocks, block)` uint8."""
    bounds, order = boundaries(kind)
    values = part.float()
    torch.amax(values.abs(), 1, out=absmax)
    values = values * (1.0 / absmax.clamp(min=1e-38))[:, None]  # as bitsandbytes rounds it
    count, above = torch.zeros_like(values), torch.empty_like(values)
    for bound in bounds.tolist():  # into floats: torch has vector instructions for those
        count += torch.gt(values, bound, out=above)
    digits = count.to(torch.uint8)
    return digits if kind == "nf4" else order[digits.int()]


def _from_table(part: Tensor, absmax: Tensor, kind: str) -> Tensor | None:
    """The same by looking it up; None where a scale is too small or too large for the table."""
    bits = part.view(torch.int16)
    size = bits & 0x7FFF  # of positive numbers: in the order of the numbers
    top = size.amax(1)
    absmax.copy_(top.view(torch.bfloat16))
    exponents, mantissas = top >> 7, top & 0x7F
    if bool((((exponents < 32) & (top > 0)) | (exponents > 222)).any()):
        return None
    lowest = torch.where(top > 0, (exponents - DEPTH) << 7, 0x7FFF)
    # Place 0 is a zero's; 1 is anything's that lies below what the table tells apart.
    place = torch.maximum(size - lowest[:, None], size.clamp(max=1))
    place |= (bits >> 15) & SIGN
    index = place.int()
    index += (mantissas.int() << 12)[:, None]
    return table(kind).index_select(0, index.view(-1)).view_as(index)


@cache
def table(kind: str) -> Tensor:
    """Digits by mantissa of the scale, sign, and how far the weight's bits are above the lowest; `(2^19,)` uint8."""
    bounds, order = boundaries(kind)
    scale = ((127 << 7) + torch.arange(128, dtype=torch.int16)).view(torch.bfloat16).float()
    bits = ((127 - DEPTH) << 7) + torch.arange(SIGN, dtype=torch.int16)
    size = bits.view(torch.bfloat16).float()
    size[0] = 0.0
    values = torch.stack([size, -size])[None] * (1.0 / scale)[:, None, None]
    return order[torch.bucketize(values, bounds)].flatten().contiguous()


@cache
def boundaries(kind: str) -> tuple[Tensor, Tensor]:
    """Middles between neighbouring levels, `(15,)`, and the digit of each level in rising order, `(16,)` uint8."""
    ops()
    from bitsandbytes.functional import get_4bit_type

    levels = get_4bit_type(kind, device="cpu").float()  # type: ignore[no-untyped-call]
    order = torch.argsort(levels)
    rising = levels[order]
    return (rising[:-1] + rising[1:]) / 2, order.to(torch.uint8)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """The 256 values of bitsandbytes' 8-bit numbers, in which scales are held."""
    ops()
    from bitsandbytes.functional import create_dynamic_map

    values: Tensor = create_dynamic_map()  # type: ignore[no-untyped-call]
    return values.to(device)
