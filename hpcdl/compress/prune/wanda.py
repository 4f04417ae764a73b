"""Wanda: a weight counts by its size times the norm of what comes in; the least of each output row go.

The score of w_ij is |w_ij|·‖X_j‖₂, with X_j the j-th input of the layer over all calibration tokens. Blocks are
pruned in order, each with the inputs that the pruned blocks before it give; no weight that stays is changed.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024 (arXiv
2306.11695), section 3 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hpcdl.compress.prune import _common
from hpcdl.spec import ExperimentSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

CALIBRATED = True
REWEIGHTS = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(_common.CalibratedConfig):
    """Wanda's keys."""

    scope: Literal["row", "layer"] = "row"  # type: ignore[assignment]  # the paper's groups
    """`row`: weights of one output compete, as in the paper; `layer`: those of a matrix (its ablation)."""


check = _common.faults


def memory(config: Config, spec: ExperimentSpec) -> dict[str, int]:
    """Bytes beside the model while it is pruned."""
    shape = spec.model.shape
    if shape is None:
        return {}
    return {
        "masks": _common.masks(config, shape),
        "scores": _common.scores(config, shape),
        "hidden_states": _common.streams(shape, config.calibration_samples, spec.data.seq_len),
        "norms": 8 * sum(columns for _, columns in _common.matrices(shape)),
    }


def apply(config: Config, model: nn.Module, text: Sequence[Mapping[str, Tensor]]) -> nn.Module:
    """Prunes block by block."""
    from hpcdl.compress.prune import _layerwise, _masks

    def prune(layer: nn.Linear, seen: _layerwise.SquaredNorms) -> None:
        kept = _masks.keep(score(layer.weight.detach(), seen.norms()), config)
        _masks.take_out(layer, kept)

    _layerwise.in_order(model, text, _layerwise.SquaredNorms, prune)
    return model


def score(weight: Tensor, norms: Tensor) -> Tensor:
    """|w_ij|·‖X_j‖₂ (equation 1), `(rows, columns)`.

    Args:
        weight: `(rows, columns)`.
        norms: ‖X_j‖₂ of each input, `(columns,)`.
    """
    return weight.abs() * norms.to(weight.device)
