"""SparseGPT: each weight that goes is made up for by those to its right in the row (blocked OBS updates).

Blocks are pruned in order, each with the inputs that the pruned blocks before it give. Of a layer with inputs
X the Hessian of the squared output error is H = 2·X·Xᵀ; columns are gone through from left to right, and the
Cholesky factor of H⁻¹ holds what optimal brain surgery needs at each of them.

Source: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023
(arXiv 2301.00774), algorithm 1; Hassibi & Stork, "Second order derivatives for network pruning: Optimal Brain
Surgeon", NeurIPS 1992.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt

from hpcdl.compress.prune import _common
from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

CALIBRATED = True
REWEIGHTS = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(_common.CalibratedConfig):
    """SparseGPT's keys."""

    block_size: Annotated[int, Ge(1)] = 128
    """Columns whose mask is chosen at a time, and whose updates are made together (B and Bs of the paper)."""
    damping: Annotated[float, Gt(0)] = 0.01
    """Added to the Hessian's diagonal, as a share of its mean."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """It decides matrix by matrix, and a block of columns holds whole groups."""
    yield from _common.faults(config, spec)
    yield from _common.refuse_global(
        config, "sparsegpt goes from block to block and makes up for each before it has seen the next"
    )
    if config.schedule != "once":
        yield Fault(
            key="prune.schedule",
            value=config.schedule,
            problem="sparsegpt makes up for what goes with weights to its right, zeros from before among them",
            allowed="once; magnitude, wanda and obd take the others",
            nearest="once",
            fix="prune.schedule=once",
        )
    group = _common.GROUPS.get(config.pattern, (0, 1))[1]
    if config.block_size % group:
        near = max(1, round(config.block_size / group)) * group
        yield Fault(
            key="prune.block_size",
            value=str(config.block_size),
            problem=f"does not hold whole groups of prune.pattern={config.pattern}",
            allowed=f"a multiple of {group}",
            nearest=str(near),
            fix=f"prune.block_size={near}",
        )


def memory(config: Config, spec: ExperimentSpec) -> dict[str, int]:
    """Bytes beside the model while it is pruned: the Hessians of one block at a time."""
    shape = spec.model.shape
    if shape is None:
        return {}
    columns = [columns for _, columns in _common.matrices(shape)]
    largest = max(rows * columns for rows, columns in _common.matrices(shape))
    return {
        "masks": largest,
        "hidden_states": _common.streams(shape, config.calibration_samples, spec.data.seq_len),
        "hessians": 4 * sum(width**2 for width in columns),
        "inverse": 3 * 4 * max(columns) ** 2,
        "weights": 2 * 4 * largest,
    }


def apply(config: Config, model: nn.Module, text: Sequence[Mapping[str, Tensor]]) -> nn.Module:
    """Prunes block by block."""
    from hpcdl.compress.prune import _layerwise, _obs

    def prune(layer: nn.Linear, seen: _layerwise.Hessian) -> None:
        _obs.prune(layer.weight, seen.hessian, config)

    _layerwise.in_order(model, text, _layerwise.Hessian, prune)
    return model
