"""From a model's matrices to held ones, in memory: what schemes share; streaming does it one by one from disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from hpcdl.compress.quant import _blocks4, _rows8
from hpcdl.distributed.decoder import blocks, inner, is_tied
from hpcdl.distributed.held import HeldEmbedding, HeldLinear, Matrix
from hpcdl.errors import HpcdlError

KINDS: dict[str, type[Matrix]] = {"int8": _rows8.Rows8, "nf4": _blocks4.Nf4, "fp4": _blocks4.Fp4}
"""Forms of a matrix that an embedding or a head may have, by what `quant.embedding` and `quant.head` call them."""


def pack_as(kind: str, weight: Tensor) -> dict[str, Tensor]:
    """A matrix → the tensors of `KINDS[kind]`."""
    return _rows8.pack(weight) if kind == "int8" else _blocks4.pack(weight, kind)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of every block that hold plain weights, by their names in the model."""
    inside = {id(module) for module in blocks(model).modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not isinstance(module, HeldLinear) and id(module) in inside:
            yield name, module


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in another's place."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def hold_linears(scheme: Any, config: Any, model: nn.Module) -> nn.Module:
    """Every block's linear layers under `scheme.pack` and `scheme.layer`.

    Raises:
        HpcdlError: a matrix can't be held so; says which.
    """
    for name, linear in list(linears(model)):
        try:
            packed = scheme.pack(config, linear.weight.detach())
        except HpcdlError as error:
            raise HpcdlError(f"quant={config.scheme}: {name}: {error}") from error
        put(model, name, scheme.layer(config, linear, packed))
    return model


def edges(config: Any, *, tied: bool) -> tuple[str, str]:
    """How the embedding and the head are held: names of KINDS, or `none`.

    Where they are one matrix, `quant.head` says it.

    Raises:
        HpcdlError: they are one matrix, and both keys say how, differently.
    """
    embedding, head = getattr(config, "embedding", "none"), getattr(config, "head", "none")
    if not tied:
        return embedding, head
    if embedding not in ("none", head):
        raise HpcdlError(
            f"quant.embedding={embedding} quant.head={head}: this model's head is its embedding, one matrix;"
            f" quant.embedding=none and quant.head={embedding}, or quant.head={head} alone"
        )
    return head, head


def hold_edges(config: Any, model: Any) -> Any:
    """The embedding and the head as `quant.embedding` and `quant.head` say; held ones stay."""
    tied = is_tied(model)
    for_embedding, for_head = edges(config, tied=tied)
    base = inner(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    held: Matrix | None = None
    if for_head != "none" and not isinstance(head, HeldLinear):
        held = matrix(for_head, head.weight, "the head")
        put_edges(base, head=held)
    if for_embedding != "none" and not isinstance(embedding, HeldEmbedding):
        if not tied or held is None:
            held = matrix(for_embedding, embedding.weight, "the embedding")
        put_edges(base, embedding=held)
    return model


def matrix(kind: str, weight: Tensor, what: str) -> Matrix:
    """A matrix as a kind of KINDS.

    Raises:
        HpcdlError: it can't be held so.
    """
    try:
        return from_tensors(kind, (len(weight), weight.shape[1]), pack_as(kind, weight))
    except HpcdlError as error:
        raise HpcdlError(f"{what} as {kind}: {error}") from error


def put_edges(base: Any, *, embedding: Matrix | None = None, head: Matrix | None = None) -> None:
    """Puts held matrices where transformers' model has its embedding and its head."""
    if embedding is not None:
        old = base.get_input_embeddings()
        base.set_input_embeddings(HeldEmbedding(embedding, old.padding_idx, old.weight.dtype))
    if head is not None:
        base.set_output_embeddings(HeldLinear(head, base.get_output_embeddings().bias))


def from_tensors(kind: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Matrix:
    """A matrix of KINDS from tensors that were packed before."""
    return KINDS[kind](*shape, tensors)
