"""int4 weights: two a byte, a scale and a zero point a group of columns; products in the training precision.

Runs on CPU and CUDA, in one process and under every strategy that leaves matrices whole (ddp, pp, cp, …); not
under FSDP (nf4 is for that) and tensor parallel. Frozen under LoRA, evaluated, or trained through the rounding
(`qat`), which FSDP takes too. Each weight becomes the nearest level; with `calibration_samples` the layer's
inputs say what an error costs, and other weights make up for it (hpcdl.compress.quant._calibrate: GPTQ).

Source: the numbers of torchao's IntxWeightOnlyConfig(int4, PerGroup, ASYMMETRIC), with bf16 scales. Its tensors
are not used: on a CPU they take a byte a weight; torchao's packed int4 (Int4WeightOnlyConfig) is for CUDA only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from hpcdl.compress.quant import _whole_numbers as shared
from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.layout import Held, Matrix

if TYPE_CHECKING:
    from torch import Tensor, nn

NEEDS: tuple[str, ...] = ()
ANY_DTYPE = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(shared.Config):
    """Keys of int4."""

    group_size: Literal[32, 64, 128] = 64
    """Columns that share a scale and a zero point: 5, 4.4 or 4.2 bits a weight."""
    calibration_samples: Annotated[int, Ge(0)] = 0
    """Training sequences that are run through the model to round for the least error of each layer's output; 0:
    to the nearest."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """Frozen, or trained through the rounding; matrices stay whole."""
    yield from shared.faults(config, spec)
    yield from shared.columns(spec, config.group_size, "a row makes no whole groups (quant.group_size)")
    if config.qat and config.calibration_samples:
        yield Fault(
            key="quant.calibration_samples",
            value=str(config.calibration_samples),
            problem="rounds a trained model once, and quant.qat=true rounds anew in every step",
            allowed="0 with quant.qat=true",
            fix="quant.calibration_samples=0",
        )


needs = shared.needs
why_whole = shared.why_whole


def memory(config: Config, matrix: Matrix, plain: int, compute: int) -> Held:
    """Half a byte a weight of the blocks and 3 a group; made whole for the product."""
    held = matrix.numel / 2 + 3 * matrix.numel / config.group_size
    return shared.memory(config, matrix, plain, compute, held=held)


def pack(config: Config, weight: Tensor) -> dict[str, Tensor]:
    """A matrix `(rows, columns)` → the tensors of `hpcdl.compress.quant._integer.Int4`.

    Raises:
        HpcdlError: a row makes no whole groups, or a weight is not finite.
    """
    from hpcdl.compress.quant import _integer

    return _integer.pack4(weight, config.group_size)


def layer(config: Config, linear: nn.Linear, packed: Mapping[str, Tensor]) -> nn.Linear:
    """What takes the place of a linear layer."""
    from hpcdl.compress.quant import _integer
    from hpcdl.distributed.held import HeldLinear

    return HeldLinear(_integer.Int4(linear.out_features, linear.in_features, packed), linear.bias)


def calibrate(
    config: Config, model: nn.Module, text: Sequence[Mapping[str, Tensor]], told: Callable[[str], None]
) -> dict[str, dict[str, Tensor]]:
    """What `pack` would give for every linear layer of the blocks, but rounded for the least error of its output.

    Args:
        config: the scheme's.
        model: transformers' causal language model, whole; changed.
        text: batches as hpcdl.compress.prune has them.
        told: hears the name of each layer that is done.

    Raises:
        HpcdlError: there is no text, or a matrix can't be held so.
    """
    from hpcdl.compress.quant import _calibrate

    return _calibrate.calibrate4(model, text, config.group_size, told)


def apply(config: Config, model: nn.Module) -> nn.Module:
    """The blocks' linear layers in int4, or rounding as they are trained.

    Raises:
        HpcdlError: a row makes no whole groups, or a weight is not finite.
    """
    from hpcdl.compress.quant import _affine, _hold, _qat

    if config.qat:
        return _qat.prepare(model, partial(_affine.rounded4, group=config.group_size))
    return _hold.hold_edges(config, _hold.hold_linears(sys.modules[__name__], config, model))  # type: ignore[no-any-return]
