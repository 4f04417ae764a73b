"""Training through the rounding: layers that compute with what their weight will be in few bits.

The weight itself stays in fp32 and is trained; each pass rounds it (and, for int8_dynamic, the input), and the
gradient goes straight through: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons",
2013; Jacob et al., CVPR 2018, section 3. The rounding is the very one of the scheme's `pack`: converting the
trained weight changes nothing but the order of floating-point sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hpcdl.compress.quant import _affine, _rows8
from hpcdl.compress.quant._hold import linears, put
from hpcdl.compress.quant._rows8 import Rows8

Rounding = Callable[[Tensor], Tensor]
"""A matrix `(rows, columns)` → what its scheme makes of it, in the same dtype."""


class FakeLinear(nn.Linear):
    """A trainable layer that rounds its weight, and its input where told so, in every pass."""

    def __init__(self, linear: nn.Linear, rounding: Rounding, *, inputs: bool) -> None:
        """Takes the place of `linear`, with its very parameters.

        Args:
            linear: what it replaces.
            rounding: of the weight.
            inputs: whether inputs are rounded to int8, a scale a token.
        """
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._rounding = rounding
        self._round_inputs = inputs

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear's, after rounding."""
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        if self._round_inputs:
            input = _RoundedTokens.apply(input)  # type: ignore[no-untyped-call]
        out: Tensor = _Product.apply(input, self.weight, self._rounding)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _Product(torch.autograd.Function):
    """`input @ rounded(weight).T`; the rounded matrix is made again for the backward pass, and kept nowhere."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, rounding: Rounding) -> Tensor:
        """`(…, columns)` → `(…, rows)`, in the input's dtype."""
        ctx.save_for_backward(input, weight)
        ctx.rounding = rounding
        return input @ rounding(weight).to(input.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Straight through: the weight's gradient is its rounded one's."""
        input, weight = ctx.saved_tensors
        own = grad.flatten(0, -2).T @ input.flatten(0, -2)
        return grad @ ctx.rounding(weight).to(grad.dtype), own.to(weight.dtype), None


class _RoundedTokens(torch.autograd.Function):
    """Inputs after a turn through int8; backward as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        """`(…, width)`, in its own dtype."""
        levels, scale = _affine.tokens8(states)
        return (levels * scale).to(states.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """As it came."""
        return grads[0]


def rounded8(weight: Tensor) -> Tensor:
    """What a matrix is after a turn through int8."""
    rows, columns = weight.shape
    return Rows8(rows, columns, _rows8.pack(weight)).whole(weight.dtype)


def prepare(model: nn.Module, rounding: Rounding, *, inputs: bool = False) -> nn.Module:
    """Has every linear layer of the blocks round its weight; parameters keep their names."""
    for name, linear in list(linears(model)):
        put(model, name, FakeLinear(linear, rounding, inputs=inputs))
    return model
