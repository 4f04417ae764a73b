"""GRPO's loss on a language model's answers, with the output head taken in chunks of tokens.

Per token t of answer i, with ρ = π(o_t) / π_old(o_t) and π of softmax(logits / temperature):

    J_it = min(ρ·A_i, clip(ρ, 1 - ε, 1 + ε)·A_i) - β·KL        KL = π_ref/π - log(π_ref/π) - 1
    loss = - Σ_i 1/|o_i| Σ_t J_it

and the gradient, which is made in the forward pass as that of the cross-entropy is (hpcdl.distributed.losses):

    dJ/d log π = [not clipped]·ρ·A - β·(1 - π_ref/π)        d log π(o)/d logits = (one-hot(o) - π) / temperature

Source: Shao et al., "DeepSeekMath", 2024, eq. 3 and 4; the estimate of the divergence: Schulman, "Approximating KL
Divergence", 2020 (k3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hpcdl.distributed.losses import CHUNK_LOGITS, IGNORE, go_back, times

MATRICES = 4
"""Matrices (tokens of a chunk × vocabulary) that are held at a time."""
MEASURED = ("loss", "kl", "entropy", "clip_fraction")
"""What the loss tells: sums over answers of means over their tokens."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What the loss is made of."""

    clip: float
    """ε."""
    kl_coef: float
    """β."""
    temperature: float


@dataclass(frozen=True, slots=True)
class Answered:
    """Each token of some answers, `(tokens,)`."""

    old: Tensor | None
    """log π_old; None: the policy is still the one that has answered."""
    reference: Tensor | None
    """log π_ref; None where β is 0."""
    advantages: Tensor
    weights: Tensor
    """1/|o_i|."""


def token_logs(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Log π of each label, 0 where it is IGNORE, `(batch, seq)` fp32; no gradient.

    Args:
        hidden: `(batch, seq, width)`.
        weight: the head `(vocabulary, width)`.
        labels: `(batch, seq)`, already shifted.
        temperature: of the softmax.
    """
    kept = labels != IGNORE
    rows, targets = in_dtype(hidden[kept]), labels[kept]
    matrix = weight.to(rows.dtype)
    found = torch.zeros(
        len(targets), dtype=torch.promote_types(rows.dtype, torch.float32), device=hidden.device
    )
    chunk = chunk_of(rows, matrix)
    for at in range(0, len(targets), chunk):
        logits = (rows[at : at + chunk] @ matrix.T).to(found.dtype) / temperature
        aim = logits.gather(1, targets[at : at + chunk, None])
        found[at : at + chunk] = (aim - logits.logsumexp(-1, keepdim=True)).squeeze(1)
    logs = found.new_zeros(labels.shape)
    logs[kept] = found
    return logs


def in_dtype(rows: Tensor) -> Tensor:
    """In autocast's dtype, where it is on."""
    if torch.is_autocast_enabled(rows.device.type):
        return rows.to(torch.get_autocast_dtype(rows.device.type))
    return rows


def chunk_of(rows: Tensor, matrix: Tensor) -> int:
    """Tokens whose logits are made at a time."""
    return max(16, CHUNK_LOGITS[rows.device.type] // (MATRICES * len(matrix)))


class LinearClipped(torch.autograd.Function):
    """The summed loss, and what MEASURED says, of some tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        answered: Answered,
        terms: Terms,
        train: bool,
    ) -> tuple[Tensor, Tensor]:
        """The loss, the sums of MEASURED and, where `train`, the gradients of the loss.

        Args:
            ctx: autograd's.
            hidden: `(tokens, width)`, in the dtype of the matmuls.
            weight: the head `(vocabulary, width)`; cast to hidden's dtype.
            labels: `(tokens,)`, none ignored.
            answered: of the same tokens.
            terms: what the loss is made of.
            train: whether a backward pass will follow.

        Returns:
            A scalar in fp32 or wider, and fp64 `(len(MEASURED),)`.
        """
        matrix = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if train and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if train and ctx.needs_input_grad[1] else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        sums = torch.zeros(len(MEASURED), dtype=torch.float64, device=hidden.device)
        chunk = chunk_of(hidden, matrix)
        for at in range(0, len(labels), chunk):
            part, states, target = (
                slice(at, at + chunk),
                hidden[at : at + chunk],
                labels[at : at + chunk, None],
            )
            logits = (states @ matrix.T).to(wide) / terms.temperature
            logs = logits.sub_(logits.logsumexp(-1, keepdim=True))
            chosen = logs.gather(1, target).squeeze(1)
            gain, slope, kl, clipped = objective(chosen, answered, part, terms)
            weights = answered.weights[part]
            probabilities = logs.exp()
            entropy = -(probabilities * logs).sum(-1)
            measured = torch.stack([-gain, kl, entropy, clipped.to(wide)])
            sums += (measured * weights).sum(-1, dtype=torch.float64)
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = -weight · slope · (one-hot - π) / temperature
            pull = (weights * slope / terms.temperature)[:, None]
            delta = probabilities.mul_(pull).scatter_add_(1, target, -pull).to(hidden.dtype)
            go_back(delta, states, matrix, at, grad_hidden, grad_weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(sums)
        return sums[0].to(wide), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """The gradients of the forward pass, times the scalar that came back."""
        return (*times(ctx.saved_tensors, grad), None, None, None, None)


def objective(chosen: Tensor, answered: Answered, part: slice, terms: Terms) -> tuple[Tensor, ...]:
    """J, dJ/d log π, the divergence, and whether the ratio is beyond its bounds, `(tokens,)` each.

    Args:
        chosen: log π of the tokens.
        answered: of more tokens.
        part: which of those these are.
        terms: ε and β.
    """
    advantages = answered.advantages[part]
    old = chosen if answered.old is None else answered.old[part]
    ratio = (chosen - old).exp()
    low, high = 1 - terms.clip, 1 + terms.clip
    plain, bounded = ratio * advantages, ratio.clamp(low, high) * advantages
    gain = torch.minimum(plain, bounded)
    slope = torch.where(plain <= bounded, plain, torch.zeros_like(plain))
    kl = torch.zeros_like(chosen)
    if answered.reference is not None:
        away = answered.reference[part] - chosen
        kl = away.exp() - away - 1
        gain = gain - terms.kl_coef * kl
        slope = slope - terms.kl_coef * (1 - away.exp())
    return gain, slope, kl, (ratio < low) | (ratio > high)
