"""rsLoRA: LoRA whose update counts alpha/√rank, so that higher ranks learn as quickly as low ones.

With LoRA's alpha/rank the update of a high rank is scaled down so far that the rank hardly matters.

Source: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023, equation 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpcdl.compress import lora
from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec

if TYPE_CHECKING:
    from torch import nn

FREEZES_BASE = lora.FREEZES_BASE
PLACES = lora.PLACES


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(lora.Config):
    """LoRA's keys; the update counts alpha/√rank."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """As LoRA's."""
    yield from lora.sizes(config, spec)
    yield from lora.begins_alike(config, use_rslora=True, use_dora=False)


memory = lora.memory


def apply(config: Config, model: nn.Module) -> nn.Module:
    """The model as peft's PeftModel: base frozen, adapters trainable."""
    return lora.inject(config, model, use_rslora=True)
