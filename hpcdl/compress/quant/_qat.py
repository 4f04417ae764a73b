"""Training through the rounding: layers that compute with what their weight will be in few bits.

The weight itself stays in fp32 and is trained; each pass rounds it (and, for int8_dynamic, the input), and the
gradient goes straight through: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons",
2013; Jacob et al., CVPR 2018, section 3. The rounding is the very one of the scheme's `pack`: converting the
trained weight changes nothing but the order of floating-point sums.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hpcdl.compress.quant import _affine, _rows8
from hpcdl.compress.quant._hold import linears, put
from hpcdl.compress.quant._rows8 import Rows8


class FakeLinear(nn.Linear):
    """A trainable layer that rounds its weight, and its input where told so, in every pass."""

    def __init__(self, linear: nn.Linear, round_weight: Callable[[Tensor], Tensor], *, inputs: bool) -> None:
        """Takes the place of `linear`, with its very parameters.

        Args:
            linear: what it replaces.
            round_weight: with a straight-through gradient.
            inputs: whether inputs are rounded to int8, a scale a token.
        """
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._round_weight = round_weight
        self._round_inputs = inputs

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear's, after rounding."""
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        if self._round_inputs:
            input = fake_tokens8(input)
        return nn.functional.linear(input, self._round_weight(self.weight), self.bias)


def fake_tokens8(states: Tensor) -> Tensor:
    """What inputs `(…, width)` are after a turn through int8, with a straight-through gradient."""
    with torch.no_grad():
        levels, scale = _affine.tokens8(states)
        rounded = (levels * scale).to(states.dtype)
    return _affine.straight(states, rounded)


def fake_rows8(weight: Tensor) -> Tensor:
    """What a matrix is after a turn through int8, with a straight-through gradient."""
    with torch.no_grad():
        rows, columns = weight.shape
        rounded = Rows8(rows, columns, _rows8.pack(weight)).whole(weight.dtype)
    return _affine.straight(weight, rounded)


def prepare(model: nn.Module, round_weight: Callable[[Tensor], Tensor], *, inputs: bool = False) -> nn.Module:
    """Has every linear layer of the blocks round its weight; parameters keep their names."""
    for name, linear in list(linears(model)):
        put(model, name, FakeLinear(linear, round_weight, inputs=inputs))
    return model
