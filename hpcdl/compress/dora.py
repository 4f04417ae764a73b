"""DoRA: LoRA of a matrix's direction, and a trained length for each of its rows.

    W' = m · (W + B·A·alpha/rank) / ‖W + B·A·alpha/rank‖

with m and the norm one number an output (peft stores W as outputs × inputs; the paper has the transpose). The
norm is taken as a constant in the backward pass, as the paper proposes.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, equations 5 and 11.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hpcdl.compress import lora
from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.layout import Beside, Matrix
from hpcdl.spec.parallel import ParallelDims

if TYPE_CHECKING:
    from torch import nn

FREEZES_BASE = lora.FREEZES_BASE
PLACES = lora.PLACES


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(lora.Config):
    """LoRA's keys."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """As LoRA's; the norm of whole rows of W must be at hand."""
    yield from lora.sizes(config, spec)
    yield from lora.begins_alike(config, use_rslora=False, use_dora=True)
    if spec.quant.scheme != "none":
        yield Fault(
            key="peft.name",
            value="dora",
            problem=f"DoRA divides by the norm of W + B·A in each pass, and quant={spec.quant.scheme} would have"
            " to make every W whole once more for it",
            allowed="peft=lora or peft=rslora with a quantized base, or quant=none",
            fix="peft=lora",
        )
    dims = ParallelDims.possible(spec.parallel, spec.cluster.world_size)
    if dims is None:
        return
    if dims.tp > 1:
        yield Fault(
            key="parallel.tp",
            value=str(dims.tp),
            problem="DoRA divides by the norm of whole rows of W + B·A, of which a tensor parallel rank has a part",
            allowed="1; peft=lora and peft=rslora go with tensor parallel",
            nearest="1",
            fix="peft=lora",
        )


def memory(config: Config, matrix: Matrix) -> Beside:
    """LoRA's, and the lengths; the product without its length is kept for their gradient."""
    beside = lora.memory(config, matrix)
    if not beside.parameters:
        return beside
    return replace(
        beside, parameters=beside.parameters + matrix.rows, kept=beside.kept + matrix.rows, lengths=True
    )


def apply(config: Config, model: nn.Module) -> nn.Module:
    """The model as peft's PeftModel: base frozen, adapters trainable."""
    return lora.inject(config, model, use_dora=True)
