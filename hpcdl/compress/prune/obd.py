"""Optimal Brain Damage: take out the weights whose loss costs least, by the second derivative of the loss.

Setting w_k to 0 in a minimum of E changes E by ½·h_kk·w_k² to second order, if the Hessian is taken as diagonal:
the saliency s_k. Least salient weights go, the rest is retrained, and so on.

Source: Le Cun, Denker & Solla, "Optimal Brain Damage", NIPS 2 (1989), section 2. For Transformers, where the
exact diagonal costs a backward pass a weight, h_kk is estimated on text (`prune.hessian`):

- `gauss_newton`: the mean squared gradient with labels drawn from the model's own predictions, which is the
  Gauss-Newton diagonal in the mean (for cross-entropy it is the Fisher information): one backward pass a probe
  and sequence, never negative. The paper too leaves out the terms with f'' (its Levenberg-Marquardt remark).
- `fisher`: the same with the text's own tokens, each token's gradient squared by itself.
- `hutchinson`: v ⊙ H·v with random signs, of the very Hessian; noisier, and about three times the work. Where
  the estimate is negative its absolute value counts, as in AdaHessian (Yao et al., AAAI 2021).

`saliencies` and `hessian_diagonal` are for any torch network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, Unpack

from annotated_types import Ge

from hpcdl.compress.prune import _common
from hpcdl.errors import HpcdlError
from hpcdl.spec import ExperimentSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

CALIBRATED = True
REWEIGHTS = False
METHODS = ("exact", "recursion", "gauss_newton", "hutchinson", "fisher")
"""Ways to the diagonal of a Hessian, for `saliencies`."""
DEFAULT_PROBES = {"hutchinson": 100, "gauss_newton": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(_common.CalibratedConfig):
    """Optimal Brain Damage's keys."""

    hessian: Literal["gauss_newton", "hutchinson", "fisher"] = "gauss_newton"
    """How the Hessian's diagonal is estimated."""
    probes: Annotated[int, Ge(1)] = 1
    """Random draws a sequence; sequences are draws too, so that 1 is enough where there are many."""


check = _common.faults


def memory(config: Config, spec: ExperimentSpec) -> dict[str, int]:
    """Bytes beside the model while it is pruned: the diagonal and a gradient of all prunable weights in fp32."""
    shape = spec.model.shape
    if shape is None:
        return {}
    weights = 4 * _common.prunable(shape)
    return {
        "masks": _common.masks(config, shape),
        "scores": _common.scores(config, shape),
        "hessian_diagonal": weights,
        "gradients": (3 if config.hessian == "hutchinson" else 1) * weights,
    }


def apply(config: Config, model: nn.Module, text: Sequence[Mapping[str, Tensor]]) -> nn.Module:
    """Takes out the weights with the lowest ½·h_kk·w_k²."""
    from hpcdl.compress.prune import _language, _masks

    layers = _masks.linears(model)
    diagonal = _language.diagonal(model, layers, text, config.hessian, config.probes)
    _masks.prune_by(
        config, layers, lambda name, layer: saliency(layer.weight.detach(), diagonal.pop(name).abs())
    )
    return model


def saliency(weight: Tensor, diagonal: Tensor) -> Tensor:
    """½·h_kk·w_k² (equation 5), in fp32 at least."""
    wide = weight if weight.dtype == diagonal.dtype else weight.to(diagonal.dtype)
    return 0.5 * diagonal * wide.square()


# --- for any network -----------------------------------------------------------------------------------------


class How(TypedDict, total=False):
    """Keyword arguments of `hessian_diagonal`, which says what they are."""

    parameters: Iterable[str] | None
    probes: int | None
    seed: int


def saliencies(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Any, Tensor]],
    method: str = "exact",
    **how: Unpack[How],
) -> dict[str, Tensor]:
    """s_k = ½·h_kk·w_k² of each weight, by the name of its parameter; arguments as in `hessian_diagonal`.

    Returns:
        Tensors of the parameters' shapes. Negative where the (estimated) curvature is.
    """
    named = dict(model.named_parameters())
    diagonal = hessian_diagonal(model, loss, batches, method, **how)
    return {name: saliency(named[name].detach(), h) for name, h in diagonal.items()}


def hessian_diagonal(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Any, Tensor]],
    method: str = "exact",
    *,
    parameters: Iterable[str] | None = None,
    probes: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """h_kk = ∂²E/∂w_k² of each weight, with E the mean of `loss(model(inputs), targets)` over the batches.

    Args:
        model: any torch network, as it is (dropout and batch norm: put it into eval mode first).
        loss: a scalar from outputs and targets: `nn.MSELoss()`, `nn.functional.cross_entropy`, ….
        batches: inputs (a tensor, or a mapping of arguments) and targets. Every batch counts the same.
        method: `exact` (autograd; any network, small), `recursion` (the paper's; nn.Sequential, what is exact in
            it stands in hpcdl.compress.prune._recursion), `gauss_newton` (exact without `probes`, else
            estimated), `hutchinson` (estimated), `fisher` (squared gradients of single samples).
        parameters: names of those that are wanted; None: all that are trained.
        probes: random draws a batch, for `hutchinson` (100 where None) and `gauss_newton`.
        seed: of the draws.

    Returns:
        Tensors of the parameters' shapes; parameters that are one (tied) stand under their first name.

    Raises:
        HpcdlError: there is no such method or parameter, no batch, or the method can't do this network.
    """
    import torch

    from hpcdl.compress.prune import _hessian, _recursion

    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters is not None:
        wanted = list(parameters)
        unknown = [name for name in wanted if name not in named]
        if unknown:
            raise HpcdlError(f"there is no trained parameter {unknown[0]}; there are {', '.join(named)}")
        named = {name: named[name] for name in wanted}
    given = list(batches)
    if not given:
        raise HpcdlError("a Hessian needs at least one batch")
    if method not in METHODS:
        raise HpcdlError(
            f"there is no method {method} for the Hessian's diagonal: one of {', '.join(METHODS)}"
        )
    draws = DEFAULT_PROBES.get(method, 0) if probes is None else probes
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        if method == "exact":
            return _hessian.exact(model, loss, given, named)
        if method == "recursion":
            return _recursion.recursion(model, loss, given, named)
        if method == "fisher":
            return _hessian.fisher(model, loss, given, named)
        estimate = _hessian.hutchinson if method == "hutchinson" else _hessian.gauss_newton
        return estimate(model, loss, given, named, draws, generator)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one round of `prune_and_retrain` has done."""

    deleted: int
    """Weights that are zero by now."""
    parameters: int
    """Weights in all."""
    predicted: float
    """Rise of E that the saliencies of this round's weights add up to."""


def prune_and_retrain(
    model: nn.Module,
    saliency_of: Callable[[nn.Module], Mapping[str, Tensor]],
    retrain: Callable[[nn.Module], None] | None,
    fractions: Iterable[float],
) -> Iterator[Round]:
    """The paper's procedure (section 2.3): saliencies, delete the lowest, retrain, again.

    Weights that are deleted stay zero while `retrain` trains: their gradients are zero, and they are set to zero
    again after it (for optimizers with momentum from before, or decay).

    Args:
        model: changed in place.
        saliency_of: saliencies by parameter name, anew each round; only the parameters that it names are pruned.
        retrain: trains the model for a while; None: no retraining, as in the paper's figure 1.
        fractions: of those parameters that are to be zero after each round, rising.

    Yields:
        A record after each round.
    """
    import torch

    from hpcdl.compress.prune import _masks

    kept: dict[str, Tensor] = {}
    for fraction in fractions:
        found = {name: value.detach() for name, value in saliency_of(model).items()}
        weights = {name: dict(model.named_parameters())[name] for name in found}
        kept = {
            name: kept.get(name, torch.ones_like(value, dtype=torch.bool)) for name, value in found.items()
        }
        total = sum(value.numel() for value in found.values())
        gone = sum(int((~mask).sum()) for mask in kept.values())
        more = max(0, _masks.to_take(total, fraction) - gone)
        stays = _lowest_of_the_rest(found, kept, more)
        predicted = sum(float(found[name][kept[name] & ~stays[name]].sum()) for name in found)
        kept = stays
        _zero(weights, kept)
        if retrain is not None:
            hooks = [w.register_hook(_masking(kept[name])) for name, w in weights.items()]  # type: ignore[no-untyped-call]
            retrain(model)
            for hook in hooks:
                hook.remove()
            _zero(weights, kept)
        yield Round(deleted=gone + more, parameters=total, predicted=predicted)


def _lowest_of_the_rest(
    found: Mapping[str, Tensor], kept: Mapping[str, Tensor], count: int
) -> dict[str, Tensor]:
    """The masks without the `count` kept weights of the lowest saliency, negative ones first."""
    import torch

    flat = torch.cat([found[name][kept[name]].double() for name in found])
    mask = torch.ones_like(flat, dtype=torch.bool)
    mask[flat.argsort(stable=True)[:count]] = False
    stays, at = {}, 0
    for name, before in kept.items():
        size = int(before.sum())
        after = before.clone()
        after[before] = mask[at : at + size]
        stays[name], at = after, at + size
    return stays


def _zero(weights: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.detach().masked_fill_(~kept[name], 0.0)


def _masking(kept: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * kept
