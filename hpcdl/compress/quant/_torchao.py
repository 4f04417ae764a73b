"""NF4 in torchao's tensors, which FSDP2 shards by rows."""

from __future__ import annotations

from typing import Any

from torch import nn

from hpcdl.distributed.decoder import blocks
from hpcdl.errors import HpcdlError

BLOCKS = (64, 32, 16)
"""Weights that share a scale: 64 as in the paper, fewer where a row of the matrix doesn't divide by it."""
SCALES = 256
"""Scales that share a scale of their own, at most: as in the paper."""


def apply(model: nn.Module) -> nn.Module:
    """Holds the linear layers of every block in NF4; embedding, norms and head stay as they are.

    Raises:
        HpcdlError: torchao isn't installed, or a matrix doesn't divide into blocks.
    """
    try:
        from torchao.quantization import to_nf4
    except ImportError as error:
        raise HpcdlError("quant.backend=torchao needs torchao: pip install 'hpcdl[quant]'") from error
    for name, module in blocks(model).named_modules():
        if isinstance(module, nn.Linear) and not hasattr(module.weight, "__tensor_flatten__"):
            block, scales = block_sizes(name, module.in_features)
            held: Any = to_nf4(module.weight.detach(), block, scales)
            module.weight = nn.Parameter(held, requires_grad=False)
    return model


def block_sizes(name: str, columns: int) -> tuple[int, int]:
    """Weights of a block, and blocks whose scales share one.

    Both divide a row, so that any number of whole rows is a tensor of its own: FSDP shards by rows.

    Raises:
        HpcdlError: no block divides a row.
    """
    block = next((size for size in BLOCKS if columns % size == 0), None)
    if block is None:
        raise HpcdlError(f"quant=nf4: {name} has {columns} columns, no multiple of {BLOCKS[-1]}; quant=none")
    a_row = columns // block
    return block, max(size for size in range(1, SCALES + 1) if a_row % size == 0)
