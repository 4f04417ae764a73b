"""The language model's loss, with the output head and the cross-entropy taken in chunks of tokens.

Logits of a 49k vocabulary at 1,024 tokens are 200 MB, as much again in gradients: in chunks a few dozen.
Source of the idea: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024 (here the
gradient is computed in the forward pass, as in Liger's fused linear cross-entropy). Over ranks that have
some rows of the vocabulary each: Shoeybi et al., "Megatron-LM", 2019, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from hpcdl.distributed.held import Matrix

CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**27}
"""Logits that are held at a time, in fp32: 64 MiB on a CPU, 512 MiB on a GPU."""

HELD_WEIGHTS = {"cpu": 2**25, "cuda": 2**27}
"""Weights of a held head that are made whole at a time: 64 MiB in bf16 on a CPU."""

IGNORE = -100
"""Label of a position that is no target."""


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of the vocabulary that a rank has, where several ranks share one."""

    group: dist.ProcessGroup
    """The ranks that have the other rows."""
    first: int
    """Index of this rank's first row in the whole vocabulary."""
    most: int
    """Rows of the rank that has most."""

    def whole(self, norm: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
        """Both of the whole vocabulary, from this rank's rows.

        Args:
            norm: log of the summed exponentials of the logits, `(tokens, 1)` fp32.
            aim: the target's logit where its row is here, else 0, `(tokens, 1)` fp32.
        """
        top = norm.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
        sums = torch.stack([(norm - top).exp(), aim])
        dist.all_reduce(sums, group=self.group)
        return top + sums[0].log(), sums[1]


def go_back(
    delta: Tensor,
    states: Tensor,
    matrix: Tensor,
    at: int,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """From a chunk's gradient of the logits to its part of those of hidden states and head; None: not wanted.

    Args:
        delta: `(chunk, vocabulary)`.
        states: hidden states of the chunk, `(chunk, width)`.
        matrix: the head, `(vocabulary, width)`.
        at: the chunk's first token.
        grad_hidden: `(tokens, width)`; its rows are set.
        grad_weight: `(vocabulary, width)`; is added to.
    """
    if grad_hidden is not None:
        grad_hidden[at : at + len(delta)] = delta @ matrix
    if grad_weight is not None:
        grad_weight += delta.T @ states


def times(gradients: Sequence[Tensor | None], scalar: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients that the forward pass has computed, times what came back for its result."""
    return tuple(None if found is None else found * scalar.to(found.dtype) for found in gradients)


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of cross-entropy(hidden @ weight.T, labels)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, train: bool, part: Part | None
    ) -> Tensor:
        """Loss and, where `train`, both gradients.

        Args:
            ctx: autograd's.
            hidden: `(tokens, width)`, in the dtype of the matmuls.
            weight: `(vocabulary, width)`; cast to hidden's dtype. This rank's rows where there is a `part`:
                the gradient of `hidden` is then this rank's summand of the whole one.
            labels: `(tokens,)`, none ignored.
            train: whether a backward pass will follow.
            part: which rows they are; None: all.

        Returns:
            fp32 scalar; summed in fp64. The same on all ranks of a `part`.
        """
        matrix = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if train and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if train and ctx.needs_input_grad[1] else None
        rows, first = len(matrix), part.first if part else 0
        # The same number of chunks on every rank: each talks to the others.
        chunk = max(64, CHUNK_LOGITS[hidden.device.type] // (part.most if part else rows))
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for at in range(0, len(labels), chunk):
            states, target = hidden[at : at + chunk], labels[at : at + chunk, None] - first
            here = (target >= 0) & (target < rows)
            target = target.clamp(0, rows - 1)
            logits = (states @ matrix.T).float()
            norm, aim = logits.logsumexp(-1, keepdim=True), logits.gather(1, target) * here
            if part:
                norm, aim = part.whole(norm, aim)
            total += (norm - aim).sum(dtype=torch.float64)
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax - one-hot
            delta = logits.sub_(norm).exp_()
            delta.scatter_add_(1, target, -here.to(delta.dtype))
            delta = delta.to(hidden.dtype)
            go_back(delta, states, matrix, at, grad_hidden, grad_weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the forward pass, times the scalar that came back."""
        return (*times(ctx.saved_tensors, grad), None, None, None)


class HeldCrossEntropy(torch.autograd.Function):
    """Sum over tokens of cross-entropy(hidden @ matrix.T, labels), a part of the vocabulary at a time.

    The softmax's sum is carried from part to part, and what was added up so far is scaled down when a larger
    logit comes: one pass gives the loss and the gradient, and the head is never whole in 16 bits.

    Source: Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018; as in FlashAttention (Dao
    et al., NeurIPS 2022), with the head's rows in the place of keys and values.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, matrix: Matrix, labels: Tensor, train: bool) -> Tensor:
        """Loss and, where `train`, the gradient of `hidden`.

        Args:
            ctx: autograd's.
            hidden: `(tokens, width)`, in the dtype of the matmuls.
            matrix: the frozen head, `(vocabulary, width)`.
            labels: `(tokens,)`, none ignored.
            train: whether a backward pass will follow.

        Returns:
            fp32 scalar; summed in fp64.
        """
        gradient = torch.empty_like(hidden) if train and ctx.needs_input_grad[0] else None
        parts = list(matrix.slices(HELD_WEIGHTS[hidden.device.type]))
        chunk = max(64, CHUNK_LOGITS[hidden.device.type] // (parts[0][1] - parts[0][0]))
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for at in range(0, len(labels), chunk):
            states, target = hidden[at : at + chunk], labels[at : at + chunk]
            of_targets = matrix.pick(target, hidden.dtype)
            aim = (states.float() * of_targets.float()).sum(-1, keepdim=True)
            top = torch.full_like(aim, -math.inf)
            norm = torch.zeros_like(aim)
            pull = None if gradient is None else states.new_zeros(states.shape, dtype=torch.float32)
            for first, last in parts:
                rows = matrix.rows(first, last, hidden.dtype)
                logits = (states @ rows.T).float()
                higher = torch.maximum(top, logits.amax(-1, keepdim=True))
                shrink = (top - higher).exp_()
                weights = logits.sub_(higher).exp_()
                norm = norm * shrink + weights.sum(-1, keepdim=True)
                if pull is not None:
                    pull.mul_(shrink).add_(weights.to(hidden.dtype) @ rows)
                top = higher
                del rows, logits, weights  # before the next part is made
            total += (top + norm.log() - aim).sum(dtype=torch.float64)
            if gradient is not None and pull is not None:
                # d loss / d hidden = the rows' mean under the softmax, less the target's row
                gradient[at : at + chunk] = pull.div_(norm).sub_(of_targets)
        matrix.used()
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        """The gradient of the forward pass, times the scalar that came back."""
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient * grad.to(gradient.dtype), None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor | Matrix, labels: Tensor, part: Part | None = None
) -> Tensor:
    """Summed cross-entropy over the positions whose label isn't IGNORE.

    Args:
        hidden: `(batch, seq, width)`.
        weight: `(vocabulary, width)`, or this rank's rows of it, or a held matrix (whole).
        labels: `(batch, seq)`, already shifted.
        part: which rows these are; None: all.
    """
    kept = labels != IGNORE
    rows = hidden[kept]
    if torch.is_autocast_enabled(hidden.device.type):
        rows = rows.to(torch.get_autocast_dtype(hidden.device.type))
    train = torch.is_grad_enabled()
    if isinstance(weight, Matrix):
        assert part is None, "a held head is whole on every rank"
        held: Tensor = HeldCrossEntropy.apply(rows, weight, labels[kept], train)  # type: ignore[no-untyped-call]
        return held
    result: Tensor = LinearCrossEntropy.apply(rows, weight, labels[kept], train, part)  # type: ignore[no-untyped-call]
    return result
