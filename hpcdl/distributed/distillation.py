"""The distillation loss, with both output heads, the cross-entropy and the divergence taken in chunks of tokens.

For each target token, with the student's logits s, the teacher's t, and the temperature T:

    (1 - alpha) · CE(s, label) + alpha · T² · KL

    forward   KL(softmax(t/T) ‖ softmax(s/T))   the student must cover all that the teacher finds likely
    reverse   KL(softmax(s/T) ‖ softmax(t/T))   the student must not do what the teacher finds unlikely

T² makes up for the gradient's 1/T², so that alpha means the same at every temperature.

Sources: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2; reverse: Gu et
al., "MiniLLM: Knowledge Distillation of Large Language Models", ICLR 2024, section 2.1 (here token by token
on the data's own text, without sampling from the student). As in hpcdl.distributed.losses the gradient is
computed in the forward pass: no pair of (tokens × vocabulary) matrices is ever held whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hpcdl.distributed.losses import CHUNK_LOGITS, IGNORE, go_back, times

MATRICES = 6
"""Matrices (tokens of a chunk × vocabulary) that are held at a time."""


@dataclass(frozen=True, slots=True)
class Mix:
    """What the loss is made of."""

    temperature: float
    """T: above 1 the teacher's small probabilities count more."""
    alpha: float
    """Weight of the divergence; the cross-entropy's is 1 - alpha."""
    reverse: bool
    """Reverse KL; else forward."""


class LinearDistillation(torch.autograd.Function):
    """Sums over tokens: the loss, its cross-entropy, and T² times its divergence."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        taught: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
        mix: Mix,
        train: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The three sums and, where `train`, the gradients of the first.

        Args:
            ctx: autograd's.
            hidden: the student's `(tokens, width)`, in the dtype of the matmuls.
            weight: the student's head `(vocabulary, width)`; cast to hidden's dtype.
            taught: the teacher's hidden states `(tokens, its width)`.
            teacher_weight: its head `(vocabulary, its width)`; cast to taught's dtype.
            labels: `(tokens,)`, none ignored.
            mix: what the loss is made of.
            train: whether a backward pass will follow.

        Returns:
            Scalars, in fp32 or wider; summed in fp64.
        """
        matrix, teacher = weight.to(hidden.dtype), teacher_weight.to(taught.dtype)
        grad_hidden = torch.empty_like(hidden) if train and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if train and ctx.needs_input_grad[1] else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        sums = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        chunk = max(16, CHUNK_LOGITS[hidden.device.type] // (MATRICES * len(matrix)))
        for at in range(0, len(labels), chunk):
            states, target = hidden[at : at + chunk], labels[at : at + chunk, None]
            student = (states @ matrix.T).to(wide)
            norm = student.logsumexp(-1, keepdim=True)
            sums[0] += (norm - student.gather(1, target)).sum(dtype=torch.float64)
            divergence, slope = _divergence(student, (taught[at : at + chunk] @ teacher.T).to(wide), mix)
            sums[1] += divergence
            if grad_hidden is None and grad_weight is None:
                continue
            # d cross-entropy / d logits = softmax - one-hot
            delta = student.sub_(norm).exp_()
            delta.scatter_add_(1, target, -torch.ones_like(target, dtype=wide))
            delta.mul_(1 - mix.alpha).add_(slope, alpha=mix.alpha)
            delta = delta.to(hidden.dtype)
            go_back(delta, states, matrix, at, grad_hidden, grad_weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        total = (1 - mix.alpha) * sums[0] + mix.alpha * sums[1]
        entropy, divergence = sums.to(wide).unbind()
        ctx.mark_non_differentiable(entropy, divergence)
        return total.to(wide), entropy, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """The gradients of the forward pass, times the scalar that came back."""
        return (*times(ctx.saved_tensors, grad), None, None, None, None, None)


def _divergence(student: Tensor, teacher: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """T² times the divergence, an fp64 scalar, and its gradient by the student's logits.

    Args:
        student: logits `(tokens, vocabulary)`; left as they are.
        teacher: its logits; used up.
        mix: temperature and direction.
    """
    temperature = mix.temperature
    log_q = torch.log_softmax(student / temperature, -1)
    log_p = torch.log_softmax(teacher.div_(temperature), -1)
    # With z = s/T: d forward / dz = q - p, and d reverse / dz = q · (log q - log p - KL).
    if mix.reverse:
        ratio, q = log_q - log_p, log_q.exp_()
        each = (q * ratio).sum(-1, keepdim=True)
        slope = ratio.sub_(each).mul_(q)
    else:
        p = log_p.exp()
        each = (p * (log_p - log_q)).sum(-1, keepdim=True)
        slope = log_q.exp_().sub_(p)
    return each.sum(dtype=torch.float64) * temperature**2, slope.mul_(temperature)


def linear_distillation(
    hidden: Tensor, weight: Tensor, taught: Tensor, teacher_weight: Tensor, labels: Tensor, mix: Mix
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, cross-entropy and T² · KL over the positions whose label isn't IGNORE.

    Args:
        hidden: the student's `(batch, seq, width)`.
        weight: its head `(vocabulary, width)`.
        taught: the teacher's hidden states `(batch, seq, its width)`.
        teacher_weight: its head `(vocabulary, its width)`.
        labels: `(batch, seq)`, already shifted.
        mix: what the loss is made of.
    """
    kept = labels != IGNORE
    rows, theirs = hidden[kept], taught[kept]
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        rows, theirs = rows.to(dtype), theirs.to(dtype)
    found: tuple[Tensor, Tensor, Tensor] = LinearDistillation.apply(  # type: ignore[no-untyped-call]
        rows, weight, theirs, teacher_weight, labels[kept], mix, torch.is_grad_enabled()
    )
    return found
