"""Whole neurons of the blocks' feed-forward layers: the least important of each block go, the same number in each.

A neuron is a row of gate and of up and a column of down. It counts by ‖W_down,j‖₂·‖X_j‖₂, X_j being what it gives
over all calibration tokens: Wanda's score of a weight (Sun et al., ICLR 2024), summed over the neuron's own outputs.
Blocks are pruned in order, each with the inputs that the pruned blocks before it give. What is zero so needs no mask
to be smaller: `hpcdl export` leaves the neurons out. Attention stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hpcdl.compress.prune import _common
from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

CALIBRATED = True
REWEIGHTS = False
MULTIPLE = 32
"""So many neurons stay, times a whole number: what formats of few bits take together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(_common.CalibratedConfig):
    """Keys of neurons."""

    sparsity: float = 0.2
    """Share of each block's neurons that goes, rounded so that a multiple of 32 stays."""
    pattern: Literal["unstructured"] = "unstructured"  # whole neurons
    """No other: whole neurons."""
    scope: Literal["layer"] = "layer"  # a block's neurons
    """Those of a block compete."""
    schedule: Literal["once"] = "once"  # before training
    """No other: before training."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """As the other methods; and not all neurons may go."""
    yield from _common.faults(config, spec)
    if not 0 <= config.sparsity < 1:
        yield Fault(
            key="prune.sparsity", value=f"{config.sparsity:g}", problem="is no share of a block's neurons",
            allowed="0 to below 1", fix="prune.sparsity=0.2",
        )  # fmt: skip


def memory(config: Config, spec: ExperimentSpec) -> dict[str, int]:
    """Bytes beside the model while it is pruned."""
    shape = spec.model.shape
    if shape is None:
        return {}
    return {
        "hidden_states": _common.streams(shape, config.calibration_samples, spec.data.seq_len),
        "norms": 8 * shape.intermediate_size,
    }


def apply(config: Config, model: nn.Module, text: Sequence[Mapping[str, Tensor]]) -> nn.Module:
    """Prunes block by block.

    Raises:
        HpcdlError: the blocks have no gate, up and down.
    """
    import torch

    from hpcdl.compress.prune import _layerwise, _masks
    from hpcdl.errors import HpcdlError

    was_training = model.training
    model.eval()
    with torch.no_grad():
        walk = _layerwise.Walk[_layerwise.SquaredNorms](model, text)
        for number, block in enumerate(walk.blocks):
            mlp = getattr(block, "mlp", None)
            if mlp is None or not all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")):
                raise HpcdlError(
                    f"prune=neurons wants blocks with mlp.gate_proj, up_proj, down_proj; {type(block)}"
                )
            norms = walk.look(number, {"down": mlp.down_proj}, _layerwise.SquaredNorms)["down"].norms()
            scores = mlp.down_proj.weight.float().norm(dim=0) * norms.to(mlp.down_proj.weight.device)
            kept = torch.zeros_like(scores, dtype=torch.bool)
            kept[scores.argsort(descending=True, stable=True)[: stays(len(scores), config.sparsity)]] = True
            for layer in (mlp.gate_proj, mlp.up_proj):
                _masks.take_out(layer, kept[:, None].expand_as(layer.weight))
            _masks.take_out(mlp.down_proj, kept[None].expand_as(mlp.down_proj.weight))
            walk.go_on(number)
    model.train(was_training)
    return model


def stays(neurons: int, sparsity: float) -> int:
    """How many neurons of a block stay."""
    return min(neurons, max(MULTIPLE, round(neurons * (1 - sparsity) / MULTIPLE) * MULTIPLE))
