"""LoRA: train a low-rank update B·A·(alpha/rank) beside each frozen matrix.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Interval

from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, PeftSpec
from hpcdl.spec.layout import Beside, Matrix

if TYPE_CHECKING:
    from torch import nn


FREEZES_BASE = True
"""The base takes no updates: the worker may hold it in bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(PeftSpec):
    """LoRA's keys, as in the paper."""

    rank: Annotated[int, Ge(1)] = 16
    """Rank r of the update."""
    alpha: Annotated[float, Gt(0)] = 32
    """Scale: the update counts alpha/rank."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Dropout before A."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the matrices (`q_proj`, `v_proj`, …), or `all-linear`."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """The rank must be below the width of the model, and there must be a target."""
    if not config.targets:
        yield Fault(
            key="peft.targets",
            value="[]",
            problem="LoRA needs at least one target",
            allowed="names of linear layers, or all-linear",
            fix="peft.targets=[all-linear]",
        )
    shape = spec.model.shape
    if shape is not None and config.rank > shape.hidden_size:
        yield Fault(
            key="peft.rank",
            value=str(config.rank),
            problem=f"the rank is above the model's width {shape.hidden_size}: no low-rank update any more",
            allowed=f"1 to {shape.hidden_size}",
            fix="peft.rank=16",
        )


def memory(config: Config, matrix: Matrix) -> Beside:
    """A and B beside a target; B's input, A's result, is kept for the backward pass."""
    linear = matrix.role == "block"
    if not linear or not (config.targets == ("all-linear",) or matrix.name in config.targets):
        return Beside()
    dropped = matrix.columns if config.dropout else 0
    return Beside(parameters=config.rank * (matrix.rows + matrix.columns), kept=config.rank + dropped)


def apply(config: Config, model: nn.Module) -> nn.Module:
    """The model as peft's PeftModel: base frozen, adapters trainable."""
    import warnings

    from peft import LoraConfig, get_peft_model

    targets = config.targets[0] if config.targets == ("all-linear",) else list(config.targets)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides by the rank: a float is fine
        lora_dropout=config.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5 by an old name
        return get_peft_model(model, lora)
