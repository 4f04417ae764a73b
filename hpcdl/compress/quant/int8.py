"""int8 weights: a byte a weight and a scale a row; inputs and products stay in the training precision.

Runs on CPU and CUDA, in one process and under every strategy that leaves matrices whole (ddp, pp, cp, …); not
under FSDP and tensor parallel. Frozen under LoRA, evaluated, or trained through the rounding (`qat`), which FSDP
takes too. A row's scale is applied to the product, so that no matrix is made whole; few rows in bf16 on a CPU
(writing text) go through torch's own kernel for int8 weights.

Source: the numbers are those of torchao's Int8WeightOnlyConfig (symmetric, a scale a row), checked in the tests.
Its tensors are not used: on a CPU their product takes twice as long (256 rows of 576 × 1536, fp32, one
thread), FSDP can't split them either (aten.split), and importing torchao costs every process 2.8 s.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpcdl.compress.quant import _whole_numbers as shared
from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.layout import Held, Matrix

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


needs = shared.needs
why_whole = shared.why_whole


def memory(config: Config, matrix: Matrix, plain: int, compute: int) -> Held:
    """A byte a weight of the blocks and 4 a row; cast to the inputs' precision for the product."""
    return shared.memory(config, matrix, plain, compute, held=matrix.numel + 4 * matrix.rows)


def pack(config: Config, weight: Tensor) -> dict[str, Tensor]:
    """A matrix `(rows, columns)` → the tensors of `hpcdl.compress.quant._rows8.Rows8`.

    Raises:
        HpcdlError: a weight is not finite.
    """
    from hpcdl.compress.quant import _rows8

    return _rows8.pack(weight)


def layer(config: Config, linear: nn.Linear, packed: Mapping[str, Tensor]) -> nn.Linear:
    """What takes the place of a linear layer."""
    from hpcdl.compress.quant import _integer

    return _integer.rows8(_integer.Int8Linear, linear, packed)


def apply(config: Config, model: nn.Module) -> nn.Module:
    """The blocks' linear layers in int8, or rounding as they are trained.

    Raises:
        HpcdlError: a weight is not finite.
    """
    from hpcdl.compress.quant import _hold, _qat

    if config.qat:
        return _qat.prepare(model, _qat.rounded8)
    return _hold.hold_edges(config, _hold.hold_linears(sys.modules[__name__], config, model))  # type: ignore[no-any-return]
