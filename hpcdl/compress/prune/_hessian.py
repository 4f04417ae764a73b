"""The diagonal of a loss's Hessian, for any torch network: exact, and estimates. See hpcdl.compress.prune.obd.

The objective E is the mean over batches of `loss(model(inputs), targets)`. h_k = ∂²E/∂w_k².
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpcdl.errors import HpcdlError

Batch = tuple[Any, Tensor]
"""Inputs (a tensor, or a mapping of arguments) and targets."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""A scalar from outputs and targets: torch's own losses are such."""
MOST_OUTPUTS = 4096
"""Outputs of a batch whose loss Hessian is made whole, `(outputs, outputs)`."""


def call(model: nn.Module, inputs: Any) -> Tensor:
    """The model's outputs."""
    out: Tensor = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return out


def exact(
    model: nn.Module, loss: Loss, batches: Sequence[Batch], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """By autograd, one backward pass through the gradient a weight: for small networks.

    Exact for every network that autograd can differentiate twice, shared weights included.
    """
    found = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for inputs, targets in batches:
        value = loss(call(model, inputs), targets)
        gradients = _grad(value, list(parameters.values()), create_graph=True)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            if not gradient.requires_grad:
                continue  # linear in all weights
            flat, into = gradient.flatten(), found[name].view(-1)
            for k in range(len(flat)):
                (row,) = _grad(flat[k], [parameter], retain_graph=True)
                into[k] += row.flatten()[k]
    return {name: total / len(batches) for name, total in found.items()}


def hutchinson(
    model: nn.Module, loss: Loss, batches: Sequence[Batch], parameters: Mapping[str, nn.Parameter],
    probes: int, generator: torch.Generator,
) -> dict[str, Tensor]:  # fmt: skip
    """Mean of v ⊙ H·v over Rademacher vectors v: unbiased, its variance per probe Σ_{l≠k} H_kl².

    Source: Bekas, Kokiopoulou & Saad, "An estimator for the diagonal of a matrix", Applied Numerical
    Mathematics 2007; H·v by a second backward pass: Pearlmutter, Neural Computation 1994.
    """
    found = {name: torch.zeros_like(p) for name, p in parameters.items()}
    weights = list(parameters.values())
    for inputs, targets in batches:
        value = loss(call(model, inputs), targets)
        add_products(value, weights, list(found.values()), probes, generator)
    return {name: total / (len(batches) * probes) for name, total in found.items()}


def add_products(
    value: Tensor, weights: Sequence[Tensor], into: Sequence[Tensor], probes: int, generator: torch.Generator
) -> None:
    """Adds `probes` times v ⊙ H·v of a scalar to tensors of the weights' shapes."""
    gradients = _grad(value, weights, create_graph=True)
    for probe in range(probes):
        signs = [rademacher(w, generator) for w in weights]
        inner = sum((g * v).sum() for g, v in zip(gradients, signs, strict=True))
        assert isinstance(inner, Tensor)
        if not inner.requires_grad:
            return  # linear in all weights: the Hessian is 0
        products = _grad(inner, weights, retain_graph=probe < probes - 1)
        for total, v, product in zip(into, signs, products, strict=True):
            total += v * product


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """+1 and -1 with equal chances."""
    bits = torch.randint(0, 2, like.shape, generator=generator, device=generator.device)
    return (bits * 2 - 1).to(like)


def gauss_newton(
    model: nn.Module, loss: Loss, batches: Sequence[Batch], parameters: Mapping[str, nn.Parameter],
    probes: int, generator: torch.Generator,
) -> dict[str, Tensor]:  # fmt: skip
    """Diagonal of Jᵀ·H_L·J: the curvature of the loss in the outputs, the network taken as linear.

    H_L is made whole for each batch (`MOST_OUTPUTS`) and taken apart as S·Sᵀ. `probes` of 0: exact, with a
    backward pass a column of S. Above 0: the mean of (Jᵀ·S·ε)² over Rademacher ε, unbiased. Never negative where
    the loss is convex in the outputs; directions in which it is concave are left out.

    Source: Schraudolph, Neural Computation 2002; Martens, JMLR 2020, section 8.

    Raises:
        HpcdlError: a batch has too many outputs.
    """
    found = {name: torch.zeros_like(p) for name, p in parameters.items()}
    weights = list(parameters.values())
    for inputs, targets in batches:
        outputs = call(model, inputs)
        if outputs.numel() > MOST_OUTPUTS:
            raise HpcdlError(
                f"gauss_newton: a batch has {outputs.numel()} outputs; smaller batches, {MOST_OUTPUTS} at most"
            )
        root = _root(outputs, targets, loss)
        columns = root.T if probes == 0 else (root @ rademacher(root[0], generator) for _ in range(probes))
        for column in columns:
            gradients = _grad(outputs, weights, column.view_as(outputs), retain_graph=True)
            for total, gradient in zip(found.values(), gradients, strict=True):
                total += gradient.square() / max(1, probes)
    return {name: total / len(batches) for name, total in found.items()}


def _root(outputs: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """S with S·Sᵀ = ∂²loss/∂outputs² without its negative part, `(outputs, rank)`."""
    whole = output_hessian(outputs.detach(), targets, loss)
    values, vectors = torch.linalg.eigh(whole)
    positive = values > values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    root: Tensor = vectors[:, positive] * values[positive].sqrt()
    return root


def output_hessian(outputs: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """∂²loss/∂outputs² over all outputs of a batch, `(outputs, outputs)`."""
    free = outputs.detach().clone().requires_grad_()
    (gradient,) = _grad(loss(free, targets), [free], create_graph=True)
    if not gradient.requires_grad:
        return torch.zeros(free.numel(), free.numel(), dtype=free.dtype, device=free.device)
    rows = [_grad(g, [free], retain_graph=True)[0].flatten() for g in gradient.flatten()]
    return torch.stack(rows)


def fisher(
    model: nn.Module, loss: Loss, batches: Sequence[Batch], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Mean over samples of the squared gradient of one sample's loss (the empirical Fisher).

    It is the Hessian's diagonal only where the loss is a log-likelihood, the model explains the data and the
    network is near its minimum (Kunstner et al., NeurIPS 2019); elsewhere it is another number.
    """
    found = {name: torch.zeros_like(p) for name, p in parameters.items()}
    weights, samples = list(parameters.values()), 0
    for inputs, targets in batches:
        for one, target in _samples(inputs, targets):
            gradients = _grad(loss(call(model, one), target), weights)
            samples += 1
            for total, gradient in zip(found.values(), gradients, strict=True):
                total += gradient.square()
    return {name: total / max(1, samples) for name, total in found.items()}


def _samples(inputs: Any, targets: Tensor) -> Iterator[tuple[Any, Tensor]]:
    for n in range(len(targets)):
        if isinstance(inputs, Mapping):
            yield {name: value[n : n + 1] for name, value in inputs.items()}, targets[n : n + 1]
        else:
            yield inputs[n : n + 1], targets[n : n + 1]


def _grad(
    of: Tensor, by: Sequence[Tensor], outer: Tensor | None = None, *,
    create_graph: bool = False, retain_graph: bool | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients; zeros where nothing depends on a tensor."""
    return torch.autograd.grad(
        of, by, outer, create_graph=create_graph, retain_graph=retain_graph, materialize_grads=True
    )
