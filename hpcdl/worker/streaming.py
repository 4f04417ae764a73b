"""A model whose matrices are held in fewer bits, read from disk tensor by tensor; never whole in 16 bits.

The model is made without memory (on torch's meta device). Each tensor of the checkpoint is read, packed by the
scheme and written to a file in the cache, by as many threads as there are cores; then everything is mapped from
that file: pages come when they are used, processes on a node share them, and the kernel may drop them again.
The next load of the same checkpoint under the same scheme only maps.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpcdl.compress import quant
from hpcdl.compress.quant import _hold
from hpcdl.distributed import shards
from hpcdl.distributed.allocator import keep_no_holes
from hpcdl.distributed.decoder import inner, is_tied
from hpcdl.distributed.held import Matrix
from hpcdl.distributed.shards import Piece
from hpcdl.errors import HpcdlError
from hpcdl.foreign import NO_CODE
from hpcdl.spec import ExperimentSpec
from hpcdl.worker.cache import cache_dir, once

VERSION = 1
"""Part of the cache's name: raise it when what is written changes."""
WEIGHTS = "weights.safetensors"
ABOUT = "about.json"
PACKED = "packed"
"""Stands between a module's name and that of a tensor of its matrix."""
NEEDLESS = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$")
"""Tensors that old checkpoints have and nobody reads."""
TENSORS_A_MATRIX = 8
"""At most, with gaps: what the header's room is reckoned by."""


class CannotStream(HpcdlError):
    """The model must be loaded whole; says why."""


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of the checkpoint, and what becomes of it."""

    piece: Piece
    name: str
    """Of the parameter in the model."""
    form: str
    """`linear`: as the scheme packs it; `plain`: in the base's dtype; else a kind of _hold.KINDS."""

    @property
    def module(self) -> str:
        """The module that has it."""
        return self.name.rpartition(".")[0]


def why_whole(spec: ExperimentSpec, place: str | None) -> str | None:
    """Why this model can't be read tensor by tensor; None where it can."""
    reason = quant.why_whole(spec)
    if reason is not None:
        return reason
    if spec.prune.name != "none":
        return f"prune={spec.prune.name} takes the weights as they were"
    if place is None:
        return "random weights are made in memory"
    folder = Path(place)
    if not folder.is_dir():
        return f"{place} is no folder on this node"
    if not shards.files(folder):
        return f"{folder} has no safetensors files"
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{folder / 'config.json'} can't be read: {error}"  # transformers will say so too
    return f"{folder} is quantized already" if "quantization_config" in about else None


def load(spec: ExperimentSpec, place: str, dtype: torch.dtype) -> Any:
    """The causal language model with its matrices held as the experiment says.

    Args:
        spec: the experiment.
        place: a folder of which `why_whole` says nothing.
        dtype: of what isn't packed, and of the weights before they are.

    Raises:
        HpcdlError: a file is missing or broken, a tensor is missing, too many, of another shape or no number.
        CannotStream: the model must be loaded whole.
    """
    folder, config = Path(place), quant.resolved(spec)
    scheme = quant.get(config.scheme)
    started = time.perf_counter()
    model = skeleton(place, spec.model.attention, dtype)
    target = cache_dir() / "quantized" / _name(folder, config, dtype)

    def build(temporary: Path) -> None:
        items = layout(model, shards.pieces(folder), folder, config)
        _write(items, temporary, scheme, config, dtype)
        about = {"source": str(folder), "config": asdict(config), "dtype": str(dtype)}
        (temporary / ABOUT).write_text(json.dumps(about, indent=1) + "\n")

    was_there = target.exists()
    made = once(target, build)
    keep_no_holes()
    fill(model, made / WEIGHTS, scheme, config)
    if os.environ.get("RANK", "0") == "0":
        how = "mapped from" if was_there else "read tensor by tensor, and kept in"
        print(f"quant={config.scheme}: {how} {target}: {time.perf_counter() - started:.1f} s", flush=True)
    return model


def _name(folder: Path, config: Any, dtype: torch.dtype) -> str:
    """All that the cached form depends on."""
    digest = hashlib.blake2b(digest_size=8)
    keys = sorted((key, value) for key, value in asdict(config).items() if key not in ("backend", "resident"))
    digest.update(f"{VERSION} {keys} {dtype}".encode())
    for file in [folder / "config.json", *shards.files(folder)]:
        found = file.stat() if file.exists() else None
        digest.update(f"{file.name} {found and (found.st_size, found.st_mtime_ns)}".encode())
    return f"{folder.name}-{config.scheme}-{digest.hexdigest()}"


def skeleton(place: str, attention: str, dtype: torch.dtype) -> Any:
    """The model without weights: parameters on the meta device, buffers as they should be.

    Raises:
        HpcdlError: the folder's config.json is no causal language model's.
        CannotStream: the model has buffers that can't be made from it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    make: Any = AutoModelForCausalLM.from_config
    try:
        config = AutoConfig.from_pretrained(place, **NO_CODE)
        with torch.device("meta"):
            model = make(config, attn_implementation=attention, dtype=dtype, **NO_CODE)
    except (OSError, ValueError) as error:
        raise HpcdlError(f"{place}: config.json is no causal language model's: {error}") from error
    if (Path(place) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(place)
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # rotary frequencies
            _hold.put(model, name, _rebuilt(name, module))
    return model.eval()


def _rebuilt(name: str, module: nn.Module) -> nn.Module:
    try:
        return type(module)(config=module.config)
    except (AttributeError, TypeError) as error:
        raise CannotStream(
            f"{name} ({type(module).__name__}) has buffers that neither checkpoint nor config gives"
        ) from error


def layout(model: Any, found: dict[str, Piece], folder: Path, config: Any) -> list[Item]:
    """What becomes of each tensor of the checkpoint, in the order in which they lie on the disk.

    Raises:
        HpcdlError: a tensor is missing, too many, of another shape or no floating-point numbers.
    """
    tied = is_tied(model)
    forms = _forms(model, config, tied=tied)
    expected = dict(model.named_parameters())
    aliases = {_head_name(model): _embedding_name(model)} if tied else {}
    items: dict[str, Item] = {}
    for piece in found.values():
        name = piece.name if piece.name in expected else aliases.get(piece.name, piece.name)
        if name not in expected:
            if NEEDLESS.search(name):
                continue
            raise HpcdlError(f"{piece}: the model that {folder / 'config.json'} describes has no such tensor")
        if name in items and name != piece.name:  # a tied head beside its embedding
            continue
        shape = tuple(expected[name].shape)
        if piece.shape != shape:
            raise HpcdlError(f"{piece} is {piece.shape}, and {shape} by {folder / 'config.json'}")
        if not piece.dtype.is_floating_point or piece.dtype.itemsize < 2:
            raise HpcdlError(f"{piece} is of {shards.NAMES[piece.dtype]}: not F32, F16 or BF16")
        items[name] = Item(piece, name, forms.get(name, "plain"))
    missing = [name for name in expected if name not in items]
    if missing:
        raise HpcdlError(
            f"{folder} lacks {missing[0]}, which {folder / 'config.json'} asks for; {len(missing)} such in all"
        )
    return sorted(items.values(), key=lambda item: (item.piece.file, item.piece.first))


def _forms(model: Any, config: Any, *, tied: bool) -> dict[str, str]:
    """The parameters that aren't held plain, and how they are."""
    forms = {f"{name}.weight": "linear" for name, _ in _hold.linears(model)}
    embedding, head = _hold.edges(config, tied=tied)
    forms |= {_head_name(model): head} if not tied else {}
    return {**forms, _embedding_name(model): embedding}


def _embedding_name(model: Any) -> str:
    return f"{_name_of(model, model.get_input_embeddings())}.weight"


def _head_name(model: Any) -> str:
    return f"{_name_of(model, model.get_output_embeddings())}.weight"


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return str(next(name for name, module in model.named_modules() if module is wanted))


def _write(items: list[Item], folder: Path, scheme: Any, config: Any, dtype: torch.dtype) -> None:
    """Reads, packs and writes all items, several at a time."""
    threads = torch.get_num_threads()
    with shards.Writer(folder / WEIGHTS, TENSORS_A_MATRIX * len(items)) as writer:

        def one(item: Item) -> None:
            if item.form == "none" or item.form == "plain":
                writer.copy(item.piece, item.name, dtype)
                return
            for key, tensor in _pack(item, scheme, config, dtype).items():
                writer.add(f"{item.module}.{PACKED}.{key}", tensor)

        # One thread more than cores: while it reads, the others compute.
        pool = ThreadPoolExecutor(threads + 1, initializer=lambda: torch.set_num_threads(1))
        try:
            for future in [pool.submit(one, item) for item in items]:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # new threads take over what was set last


def _pack(item: Item, scheme: Any, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    weight = item.piece.read()
    narrower = weight.dtype == torch.bfloat16 and (item.form != "linear" or hasattr(scheme, "ANY_DTYPE"))
    weight = weight if narrower else weight.to(dtype)  # as it would be in memory
    try:
        if item.form == "linear":
            packed: dict[str, Tensor] = scheme.pack(config, weight)
            return packed
        return _hold.pack_as(item.form, weight)
    except HpcdlError as error:
        raise HpcdlError(f"{item.piece}: {error}") from error


def fill(model: Any, file: Path, scheme: Any, config: Any) -> None:
    """Gives a skeleton its weights, mapped from a file of `_write`.

    Raises:
        HpcdlError: the file is broken.
    """
    tensors = dict(_mapped(file))
    for name in [name for name, _ in model.named_parameters() if name in tensors]:
        module, _, own = name.rpartition(".")
        parameter = nn.Parameter(tensors.pop(name), requires_grad=True)
        setattr(model.get_submodule(module), own, parameter)
    model.tie_weights()
    tied = is_tied(model)
    embedding, head = _hold.edges(config, tied=tied)
    base = inner(model)
    if embedding != "none":
        old = base.get_input_embeddings()
        matrix = _matrix(embedding, old, _name_of(model, old), tensors)
        _hold.put_edges(base, embedding=matrix, head=matrix if tied else None)
    if head != "none" and not tied:
        old = base.get_output_embeddings()
        _hold.put_edges(base, head=_matrix(head, old, _name_of(model, old), tensors))
    for name, linear in list(_hold.linears(model)):
        _hold.put(model, name, scheme.layer(config, linear, _below(name, tensors)))
    if getattr(config, "resident", "all") == "layer":
        for module in model.modules():
            if isinstance(module, Matrix):
                module.give_back_after_use()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise HpcdlError(f"{file} lacks {left[0]}: delete the folder {file.parent}, it is made again")


def _matrix(kind: str, module: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    shape = tuple(module.weight.shape)
    return _hold.from_tensors(kind, shape, _below(name, tensors))


def _below(module: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A module's packed tensors by their own names."""
    start = f"{module}.{PACKED}."
    return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}


def _mapped(file: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a file; their pages are read when they are used."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # no mapping
                if not name.startswith("_gap."):
                    yield name, opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise HpcdlError(f"{file} can't be read: {error}; delete the folder {file.parent}") from error
