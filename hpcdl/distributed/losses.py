"""The language model's loss, with the output head and the cross-entropy taken in chunks of tokens.

Logits of a 49k vocabulary at 1,024 tokens are 200 MB, as much again in gradients: in chunks a few dozen.
Source of the idea: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024 (here the
gradient is computed in the forward pass, as in Liger's fused linear cross-entropy).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**27}
"""Logits that are held at a time, in fp32: 64 MiB on a CPU, 512 MiB on a GPU."""

IGNORE = -100
"""Label of a position that is no target."""


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of cross-entropy(hidden @ weight.T, labels)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, train: bool) -> Tensor:
        """Loss and, where `train`, both gradients.

        Args:
            ctx: autograd's.
            hidden: `(tokens, width)`, in the dtype of the matmuls.
            weight: `(vocabulary, width)`; cast to hidden's dtype.
            labels: `(tokens,)`, none ignored.
            train: whether a backward pass will follow.

        Returns:
            fp32 scalar; summed in fp64.
        """
        matrix = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if train and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if train and ctx.needs_input_grad[1] else None
        chunk = max(64, CHUNK_LOGITS[hidden.device.type] // weight.shape[0])
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for at in range(0, len(labels), chunk):
            part, target = hidden[at : at + chunk], labels[at : at + chunk, None]
            logits = (part @ matrix.T).float()
            norm = logits.logsumexp(-1, keepdim=True)
            total += (norm - logits.gather(1, target)).sum(dtype=torch.float64)
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax - one-hot
            delta = logits.sub_(norm).exp_()
            delta.scatter_add_(1, target, torch.full_like(norm, -1.0))
            delta = delta.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[at : at + chunk] = delta @ matrix
            if grad_weight is not None:
                grad_weight += delta.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """The gradients of the forward pass, times the scalar that came back."""
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * grad.to(grad_weight.dtype),
            None,
            None,
        )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy over the positions whose label isn't IGNORE.

    Args:
        hidden: `(batch, seq, width)`.
        weight: `(vocabulary, width)`.
        labels: `(batch, seq)`, already shifted.
    """
    kept = labels != IGNORE
    rows = hidden[kept]
    if torch.is_autocast_enabled(hidden.device.type):
        rows = rows.to(torch.get_autocast_dtype(hidden.device.type))
    result: Tensor = LinearCrossEntropy.apply(rows, weight, labels[kept], torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return result
