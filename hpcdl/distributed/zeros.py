"""Zeros that stay while a model is trained: the zeros of the weights are the mask.

A linear layer whose weight is trained gives no gradient to a weight that is 0. Its optimizer state then stays 0
too, and a step of any optimizer that works weight by weight (SGD with momentum, AdamW with decay, 8-bit ones)
leaves it 0: there is no mask to hold, to shard or to save, and a checkpoint carries it in the weights. It acts
inside the layer's own passes, so that it is the same under every strategy that runs them, sharded or not. A
weight that training itself takes to exactly 0 stays there too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hpcdl.errors import HpcdlError


class _KeepZeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        masked: Tensor = gradient * (weight != 0)
        return masked


def keep_zeros(weight: Tensor) -> Tensor:
    """The weight as it is; its gradient is 0 where it is."""
    kept: Tensor = _KeepZeros.apply(weight)  # type: ignore[no-untyped-call]
    return kept


class KeepsZeros(nn.Linear):
    """A linear layer whose zeros get no gradient."""

    def forward(self, input: Tensor) -> Tensor:
        """As every linear layer's."""
        return nn.functional.linear(input, keep_zeros(self.weight), self.bias)


def keep(layer: nn.Linear) -> None:
    """Has a layer keep its zeros while it is trained, in place: it is the same module with the same weight.

    Raises:
        HpcdlError: it isn't a plain linear layer.
    """
    if type(layer) is not nn.Linear:
        raise HpcdlError(
            f"pruned weights of a {type(layer).__name__} can't be trained: their zeros would be lost; prune=none"
        )
    layer.__class__ = KeepsZeros
