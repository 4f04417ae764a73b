"""Magnitude pruning: the smallest weights are taken out; no text is needed.

Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015. There
the rest is retrained: `trainer.max_steps` does that here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpcdl.compress.prune import _common
from hpcdl.spec import ExperimentSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

CALIBRATED = False
REWEIGHTS = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(_common.PatternConfig):
    """Pattern, sparsity and scope are all there is."""


check = _common.faults


def memory(config: Config, spec: ExperimentSpec) -> dict[str, int]:
    """Bytes beside the model while it is pruned."""
    shape = spec.model.shape
    if shape is None:
        return {}
    return {"masks": _common.masks(config, shape), "scores": _common.scores(config, shape)}


def apply(config: Config, model: nn.Module, text: Sequence[Mapping[str, Tensor]] = ()) -> nn.Module:
    """Takes out the weights with the smallest absolute values."""
    from hpcdl.compress.prune import _masks

    _masks.prune_by(config, _masks.linears(model), lambda name, layer: layer.weight.detach().abs())
    return model
