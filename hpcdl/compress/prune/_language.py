"""Estimates of the Hessian's diagonal of a causal language model, for the linear layers of its blocks.

E is the mean cross-entropy over all target tokens of the calibration text. Gradients are taken a batch of few
sequences at a time; what is random (drawn labels, signs) makes the square of a batch's summed gradient a fair
estimate of the sum of its tokens' squares, so that no token needs a backward pass of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpcdl.compress.prune._hessian import add_products, rademacher
from hpcdl.distributed.decoder import Stage, trunk
from hpcdl.distributed.losses import CHUNK_LOGITS, IGNORE, linear_cross_entropy
from hpcdl.errors import HpcdlError

SEED = 0
"""Of the draws: the same text gives the same zeros."""


def diagonal(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    text: Sequence[Mapping[str, Tensor]],
    how: str,
    probes: int,
) -> dict[str, Tensor]:
    """h_kk of each layer's weights by the layer's name, fp32, `(rows, columns)`.

    Args:
        model: transformers' causal language model; its mode is kept.
        layers: whose weights.
        text: calibration batches (hpcdl.compress.prune).
        how: `gauss_newton`, `fisher` or `hutchinson`.
        probes: draws a batch.

    Raises:
        HpcdlError: there is no text, or no layer takes gradients.
    """
    if not text:
        raise HpcdlError("Optimal Brain Damage needs text: no batch was given")
    found = {name: torch.zeros_like(layer.weight, dtype=torch.float32) for name, layer in layers.items()}
    weights = [layer.weight for layer in layers.values()]
    frozen = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    generator = torch.Generator().manual_seed(SEED)
    model.eval()
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        targets = 0
        with torch.enable_grad():
            for batch in text:
                here = {name: value.to(weights[0].device) for name, value in batch.items()}
                targets += int((here["labels"] != IGNORE).sum())
                if how == "hutchinson":
                    _products(model, here, weights, list(found.values()), probes, generator)
                else:
                    _squares(model, here, weights, list(found.values()), how, probes, generator)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
        for parameter in frozen:
            parameter.requires_grad_(True)
        model.train(training)
    return {name: total / (max(1, targets) * probes) for name, total in found.items()}


def _squares(
    model: nn.Module, batch: Mapping[str, Tensor], weights: Sequence[Tensor], into: Sequence[Tensor], how: str,
    probes: int, generator: torch.Generator,
) -> None:  # fmt: skip
    """Adds squared gradients of a batch's summed loss.

    Labels that the model draws have gradients of mean 0, independent from token to token: the cross terms of
    the square vanish in the mean (Martens, JMLR 2020, section 5; Liu et al., "Sophia", 2023, algorithm 2). The
    text's own tokens get random signs instead, to the same end.
    """
    stage = Stage(model)
    if not stage.has_plain_head():
        raise HpcdlError(
            f"prune.hessian={how} needs a plain output head, which {type(model).__name__} has not:"
            " prune.hessian=hutchinson"
        )
    head = stage.head().weight
    hidden = trunk(model)(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)[
        0
    ]
    wanted = batch["labels"] != IGNORE
    for probe in range(probes):
        labels, states = batch["labels"], hidden
        if how == "gauss_newton":
            labels = labels.clone()
            labels[wanted] = draw(hidden.detach()[wanted], head, generator)
        else:
            signs = rademacher(wanted[..., None].to(hidden), generator)
            states = hidden * signs + (hidden * (1 - signs)).detach()  # the same values, gradients with signs
        value = linear_cross_entropy(states, head, labels)
        gradients = torch.autograd.grad(value, weights, retain_graph=probe < probes - 1)
        for total, gradient in zip(into, gradients, strict=True):
            total += gradient.float().square_()


def draw(hidden: Tensor, head: Tensor, generator: torch.Generator) -> Tensor:
    """A token for each hidden state from the model's own prediction, `(tokens,)`.

    Args:
        hidden: `(tokens, width)`.
        head: `(vocabulary, width)`.
        generator: of the draws.
    """
    chunk = max(1, CHUNK_LOGITS[hidden.device.type] // len(head))
    drawn = []
    for states in torch.split(hidden, chunk):
        logits = (states @ head.detach().to(states.dtype).T).float()
        # an inverse of the cumulated probabilities: one number a token is drawn, on whatever device
        level = torch.rand(len(states), 1, generator=generator, dtype=torch.float64).to(logits.device)
        below = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
        drawn.append((below < level * below[:, -1:]).sum(-1).clamp_max(len(head) - 1))
    return torch.cat(drawn)


def _products(
    model: Any, batch: Mapping[str, Tensor], weights: Sequence[Tensor], into: Sequence[Tensor], probes: int,
    generator: torch.Generator,
) -> None:  # fmt: skip
    """Adds v ⊙ H·v of a batch's summed loss; attention is computed so that it can be differentiated twice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        value = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=IGNORE, reduction="sum"
        )
        add_products(value, weights, into, probes, generator)
