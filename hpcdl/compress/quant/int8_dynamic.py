"""int8 weights and int8 inputs: a scale a row, and one a token as it comes; products are of whole numbers.

Runs on CPU (torch._int_mm; quick where it has VNNI instructions) and on CUDA (where every matrix must have a
multiple of 8 rows and columns), in one process and under every strategy that leaves matrices whole (ddp, pp, cp,
…); not under FSDP and tensor parallel. Frozen under LoRA, with the gradient going straight through the inputs'
rounding; evaluated; or trained through both roundings (`qat`), which FSDP takes too.

Source: Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", NeurIPS 2022, section
2.1, without its 16-bit columns for outliers: models of less than 6.7B parameters have few (their section 4). The
numbers are those of torchao's Int8DynamicActivationInt8WeightConfig; its tensors are not used: their product has
no backward pass on a CPU, and takes four times as long (256 rows of 576 × 1536, fp32, one thread).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpcdl.compress.quant import _whole_numbers as shared
from hpcdl.compress.quant import int8
from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

NEEDS: tuple[str, ...] = ()
FORM = "scaled"
"""Of its product: scaled once more (hpcdl.plan.block.Linear)."""
ANY_DTYPE = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(shared.Config):
    """Nothing of its own."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """Frozen, or trained through the rounding; matrices stay whole."""
    yield from shared.faults(config, spec)
    if spec.cluster.gpus_per_node:
        yield from shared.columns(spec, 8, "CUDA's product of int8 matrices needs that")


needs, why_whole = shared.needs, shared.why_whole
memory, pack = int8.memory, int8.pack


def layer(config: Config, linear: nn.Linear, packed: Mapping[str, Tensor]) -> nn.Linear:
    """What takes the place of a linear layer."""
    from hpcdl.compress.quant import _integer

    return _integer.rows8(_integer.Int8DynamicLinear, linear, packed)


def apply(config: Config, model: nn.Module) -> nn.Module:
    """The blocks' linear layers with int8 inputs and weights, or rounding as they are trained.

    Raises:
        HpcdlError: a weight is not finite.
    """
    from hpcdl.compress.quant import _hold, _qat

    if config.qat:
        return _qat.prepare(model, _qat.rounded8, inputs=True)
    return _hold.hold_edges(config, _hold.hold_linears(sys.modules[__name__], config, model))  # type: ignore[no-any-return]
