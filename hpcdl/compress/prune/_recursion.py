"""Optimal Brain Damage's own recursion: second derivatives go backward as first ones do.

With a_i the sum that goes into unit i, x_i = f(a_i) what comes out (Le Cun, Denker & Solla, NIPS 1989, section
2.2):

    h_kk = Σ ∂²E/∂w_ij² over all connections (i, j) that have weight k               equation 6
    ∂²E/∂w_ij² = ∂²E/∂a_i² · x_j²                                                     equation 7
    ∂²E/∂a_i² = f'(a_i)² Σ_l w_li² ∂²E/∂a_l² + f''(a_i) ∂E/∂x_i                        equation 8

with the output's own second derivatives at the top (equation 9 is that of the squared error). It costs as much
as backpropagation. What it leaves out are the mixed derivatives ∂²E/∂a_l∂a_l' of units of one layer, and of
connections that share a weight:

- The last weights are exact: nothing mixed goes into them, whatever the loss.
- So are the last but one where the outputs don't mix in the loss (squared error, sigmoid or linear outputs).
- Below them it is the paper's diagonal approximation.
- Shared weights (a convolution's) are approximate also there: the paper sums over connections, each alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hpcdl.compress.prune._hessian import Batch, Loss
from hpcdl.errors import HpcdlError

ELEMENTWISE = (
    nn.Tanh, nn.Sigmoid, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.LogSigmoid, nn.Hardtanh,
)  # fmt: skip
"""Functions of one number each; a module of your own says so with an attribute `elementwise = True`."""


def recursion(
    model: nn.Module, loss: Loss, batches: Sequence[Batch], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The diagonal of a feed-forward network's Hessian as the paper has it.

    Args:
        model: nn.Sequential (nested ones too) of nn.Linear, nn.Conv2d, pooling, nn.Flatten and functions of one
            number.
        loss: a scalar from outputs `(samples, …)` and targets, a sum or mean over samples.
        batches: inputs `(samples, …)` and targets.
        parameters: whose diagonal is wanted.

    Raises:
        HpcdlError: the model has a layer that the recursion has no rule for.
    """
    layers = list(_leaves(model))
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def add(parameter: Tensor | None, value: Callable[[], Tensor]) -> None:
        if parameter is not None and id(parameter) in names:
            found[names[id(parameter)]] += value()

    for inputs, targets in batches:
        entered = []
        x = inputs
        with torch.no_grad():
            for layer in layers:
                entered.append(x)
                x = layer(x)
        first, second = _at_the_top(x, targets, loss)
        for layer, x in zip(reversed(layers), reversed(entered), strict=True):
            first, second = _through(layer, x, first, second, add)
    return {name: total / len(batches) for name, total in found.items()}


def _leaves(model: nn.Module) -> Iterator[nn.Module]:
    if not isinstance(model, nn.Sequential):
        raise HpcdlError(
            f"the paper's recursion goes through layers one after the other: nn.Sequential, not {type(model).__name__};"
            " method=exact, gauss_newton or hutchinson take any network"
        )
    for layer in model:
        if isinstance(layer, nn.Sequential):
            yield from _leaves(layer)
        else:
            yield layer


def _at_the_top(outputs: Tensor, targets: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """∂E/∂output and ∂²E/∂output² of each sample, of the outputs' shape.

    Samples don't mix in a loss: all samples' k-th outputs are differentiated at once.
    """
    free = outputs.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(free, targets), free, create_graph=True)
    second = torch.zeros_like(free)
    if gradient.requires_grad:
        flat, into = gradient.flatten(1), second.view(len(free), -1)
        for k in range(flat.shape[1]):
            (row,) = torch.autograd.grad(flat[:, k].sum(), free, retain_graph=True)
            into[:, k] = row.flatten(1)[:, k]
    return gradient.detach(), second


Add = Callable[[Tensor | None, Callable[[], Tensor]], None]


def _through(layer: nn.Module, x: Tensor, first: Tensor, second: Tensor, add: Add) -> tuple[Tensor, Tensor]:
    """From a layer's outputs to its inputs; its own weights' part is added on the way.

    Args:
        layer: one of the network's.
        x: what it was given.
        first: ∂E/∂output.
        second: ∂²E/∂output².
        add: takes a parameter and what to add to its diagonal.
    """
    if isinstance(layer, nn.Linear | nn.Conv2d):
        weight = layer.weight.detach()
        apply = _linear_map(layer)
        add(layer.weight, lambda: _back(lambda w: apply(x.square(), w), weight, second))  # equations 6 and 7
        add(layer.bias, lambda: second.sum([d for d in range(second.dim()) if d != _channels(layer, second)]))
        below = _back(lambda v: apply(v, weight), x, first)
        return below, _back(lambda v: apply(v, weight.square()), x, second)  # equation 8, before f
    if isinstance(layer, ELEMENTWISE) or getattr(layer, "elementwise", False):
        slope, bend = _derivatives(layer, x)
        return slope * first, slope.square() * second + bend * first  # equation 8
    if isinstance(layer, nn.AvgPool2d) and not layer.padding and not layer.ceil_mode:
        size = layer.kernel_size if isinstance(layer.kernel_size, tuple) else (layer.kernel_size,) * 2
        share = 1.0 / (layer.divisor_override or size[0] * size[1])
        return _back(layer, x, first), _back(layer, x, second) * share
    if isinstance(layer, nn.Flatten | nn.Unflatten | nn.Identity | nn.MaxPool2d) or (
        isinstance(layer, nn.Dropout) and (not layer.training or layer.p == 0)
    ):
        return _back(layer, x, first), _back(layer, x, second)  # each number goes its way, or doesn't
    raise HpcdlError(
        f"the paper's recursion has no rule for {type(layer).__name__}: method=exact, gauss_newton or hutchinson"
        " take any network"
    )


def _linear_map(layer: nn.Linear | nn.Conv2d) -> Callable[[Tensor, Tensor], Tensor]:
    """What the layer does with inputs and a weight, without bias."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear
    return lambda x, weight: layer._conv_forward(x, weight, None)


def _channels(layer: nn.Linear | nn.Conv2d, outputs: Tensor) -> int:
    return outputs.dim() - 1 if isinstance(layer, nn.Linear) else 1


def _back(function: Callable[[Tensor], Tensor], at: Tensor, outer: Tensor) -> Tensor:
    """`outer` times the derivative of `function`."""
    free = at.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(function(free), free, outer)
    return found


def _derivatives(function: nn.Module, at: Tensor) -> tuple[Tensor, Tensor]:
    """F' and f'' of each number."""
    free = at.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(free).sum(), free, create_graph=True)
    if not slope.requires_grad:
        return slope.detach(), torch.zeros_like(slope)
    (bend,) = torch.autograd.grad(slope.sum(), free, materialize_grads=True)
    return slope.detach(), bend
