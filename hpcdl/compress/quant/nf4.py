"""QLoRA: the frozen base in 4-bit NormalFloat, a low-rank update trained beside it.

16 levels at the quantiles of a normal distribution; 64 weights share a scale, and the scales are held in 8
bits themselves (double quantization): 4.13 bits a weight, or a little more. Each product makes its matrix whole
again.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, sections 3 and 4.
Runs on CPUs and GPUs.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from hpcdl.compress.quant import _four
from hpcdl.compress.quant._four import Config, check, fill, layer, memory, needs, pack, why_whole

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Config", "apply", "check", "fill", "layer", "memory", "needs", "pack", "why_whole"]

NEEDS = ("torchao", "bitsandbytes")
ANY_DTYPE = True
"""`pack` gives the same for bf16 weights and for the same numbers in fp32."""


def apply(config: Config, model: nn.Module) -> nn.Module:
    """Holds the linear layers of every block in 4 bits; embedding and head as their keys say."""
    return _four.apply(config, model, sys.modules[__name__])
