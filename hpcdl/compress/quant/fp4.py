"""A frozen base in 4-bit floating point, a low-rank update trained beside it.

Sign, 2 bits of exponent, one of mantissa, with a doubly quantized scale for 64 weights: the form that NF4 is
measured against in Dettmers et al., "QLoRA", NeurIPS 2023, table 2. Runs on CPUs and GPUs, not under FSDP.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from hpcdl.compress.quant import _four
from hpcdl.compress.quant._four import Config, check, fill, layer, memory, needs, pack, why_whole

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Config", "apply", "check", "fill", "layer", "memory", "needs", "pack", "why_whole"]

NEEDS = ("bitsandbytes",)
ANY_DTYPE = True
"""`pack` gives the same for bf16 weights and for the same numbers in fp32."""


def apply(config: Config, model: nn.Module) -> nn.Module:
    """Holds the linear layers of every block in 4 bits; embedding and head as their keys say."""
    return _four.apply(config, model, sys.modules[__name__])
