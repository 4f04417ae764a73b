"""SparseGPT's solver: one layer, given the Hessian of its squared output error.

Source: Frantar & Alistarh, ICML 2023, algorithm 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hpcdl.compress.prune._common import GROUPS
from hpcdl.compress.prune._masks import all_but_smallest, keep_in_groups, to_take
from hpcdl.errors import HpcdlError

if TYPE_CHECKING:
    from hpcdl.compress.prune.sparsegpt import Config


@torch.no_grad()
def prune(weight: Tensor, hessian: Tensor, config: Config) -> None:
    """Takes weights out of a matrix and makes up for them with those that stay; in place.

    Args:
        weight: `(rows, columns)`.
        hessian: 2·X·Xᵀ up to a factor, `(columns, columns)`, in fp32 or fp64.
        config: pattern, sparsity, block size, damping.

    Raises:
        HpcdlError: the Hessian isn't positive definite with this damping.
    """
    work = weight.detach().to(hessian.dtype).clone()
    factor, dead = inverse_factor(hessian, config.damping)
    work[:, dead] = 0  # an input that is always 0: what it is multiplied with doesn't matter
    columns = work.shape[1]
    for first in range(0, columns, config.block_size):
        last = min(first + config.block_size, columns)
        errors = _block(work[:, first:last], factor[first:last, first:last], config)
        work[:, last:] -= errors @ factor[first:last, last:]
    weight.copy_(work)


def _block(work: Tensor, factor: Tensor, config: Config) -> Tensor:
    """Prunes a block of columns in place; returns the errors that the columns to its right make up for."""
    diagonal = factor.diagonal()
    errors = torch.zeros_like(work)
    kept = torch.ones_like(work, dtype=torch.bool)
    if config.pattern not in GROUPS:
        saliency = work.square() / diagonal.square()  # w²/[H⁻¹]_jj, of the columns that are left at j
        (kept,) = all_but_smallest([saliency], to_take(work.numel(), config.sparsity))
    for j in range(work.shape[1]):
        if config.pattern in GROUPS:
            zeros, group = GROUPS[config.pattern]
            if j % group == 0:  # with all updates of the columns before it
                span = slice(j, j + group)
                saliency = work[:, span].square() / diagonal[span].square()
                kept[:, span] = keep_in_groups(saliency, zeros, group)
        gone = torch.where(kept[:, j], 0.0, work[:, j])
        errors[:, j] = gone / diagonal[j]
        work[:, j:] -= errors[:, j, None] * factor[j, j:]
        work[:, j].masked_fill_(~kept[:, j], 0.0)
    return errors


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the damped Hessian's inverse, and which inputs are always 0.

    Its row j from j on is the row of the inverse of H[j:, j:], over the square root of its first element.

    Args:
        hessian: `(columns, columns)`.
        damping: as a share of the diagonal's mean.

    Raises:
        HpcdlError: it isn't positive definite.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damping * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return torch.linalg.cholesky(inverse, upper=True), dead
    except RuntimeError as error:  # torch.linalg.LinAlgError
        raise HpcdlError(
            f"sparsegpt: a layer's Hessian is not positive definite with prune.damping={damping:g}: more damping,"
            " or more prune.calibration_samples"
        ) from error
