"""Models whose weights are held in few bits, in folders: written once, read again tensor by tensor, mapped.

`config.json` says it twice: under KEY the scheme and its keys, which hpcdl reads; as `quantization_config` what
transformers makes of the same files (compressed-tensors, bitsandbytes: hpcdl.compress.quant._files).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpcdl.compress import quant
from hpcdl.compress.quant import _files, _hold
from hpcdl.distributed import shards
from hpcdl.distributed.decoder import inner, is_tied
from hpcdl.distributed.held import HeldEmbedding, HeldLinear, Matrix
from hpcdl.distributed.shards import Piece
from hpcdl.errors import HpcdlError
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.model import QUANTIZED as KEY
from hpcdl.spec.plain import to_plain
from hpcdl.worker import streaming
from hpcdl.worker.cache import cache_dir, once

CALIBRATION = 1
"""Part of the cache's name: raise it when the same model and text become other numbers."""
ROUNDED = "rounded.safetensors"


# --- writing ---------------------------------------------------------------------------------------------------


def write(model: Any, config: Any, folder: Path) -> None:
    """Writes a model whose blocks are held under a scheme.

    Args:
        model: transformers' causal language model.
        config: the scheme's; what was done once (calibration, training through the rounding) is left out.
        folder: is there, and empty.

    Raises:
        HpcdlError: a layer of the blocks isn't held by a form that has names in files, or the disk is full.
    """
    plain = next((name for name, _ in _hold.linears(model)), None)
    if plain is not None:
        raise HpcdlError(f"quant={config.scheme}: {plain} is not held in few bits: it can't be written so")
    base = inner(model)
    tensors = dict(_tensors(base))
    # The largest numbers first: each tensor begins where its dtype may.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    shards.save(folder, {name: tensors[name].detach().cpu().contiguous() for name in order})
    about = base.config.to_dict()
    edges = any(isinstance(part, HeldEmbedding) for part in base.modules())
    edges = edges or isinstance(base.get_output_embeddings(), HeldLinear)
    once_only = {"qat": False, "calibration_samples": 0, "backend": "bitsandbytes"}
    keys = {name: once_only.get(name, value) for name, value in to_plain(config).items()}
    about |= {KEY: keys, "quantization_config": _files.told_to_transformers(config, edges=edges)}
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    if base.generation_config is not None:
        base.generation_config.save_pretrained(folder)


def _tensors(base: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a model by the names that they have in files, tied ones once."""
    inside: set[int] = set()
    for name, module in base.named_modules():
        if not isinstance(module, Matrix):
            continue
        if module.kind not in _files.FORMS:
            raise HpcdlError(f"{name}: there are no names in files for {module.kind}")
        inside |= {id(parameter) for parameter in module.parameters()}
        for own, tensor in _files.FORMS[module.kind].write(module).items():
            yield f"{name.removesuffix('.matrix')}.{own}", tensor
    for name, parameter in base.named_parameters():
        if id(parameter) not in inside:
            yield name, parameter


def readers(folder: Path) -> str:
    """Who reads a folder that `write` wrote."""
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    method = told["quant_method"]
    return "hpcdl" if method == "hpcdl" else f"hpcdl; transformers with {method}"


# --- reading ---------------------------------------------------------------------------------------------------


def scheme_of(folder: Path) -> Any:
    """The config that a folder was written under; None where it wasn't written here.

    Raises:
        HpcdlError: it is of a scheme, or has keys, that this version doesn't know.
    """
    told = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(KEY)
    if told is None:
        return None
    try:
        return quant.get(told["scheme"]).Config(**told)
    except (KeyError, TypeError) as error:
        raise HpcdlError(f"{folder / 'config.json'}: {KEY} is not known here: {error}") from error


def load(folder: Path, config: Any, attention: str, dtype: torch.dtype) -> Any:
    """A model that `write` wrote, its held matrices mapped from the files.

    Args:
        folder: where.
        config: what `scheme_of` gave.
        attention: transformers' name of the implementation.
        dtype: of what isn't held.

    Raises:
        HpcdlError: a file is missing or cut short, or a tensor is missing, of another shape, or no number.
    """
    pieces = shards.pieces(folder)
    model = streaming.skeleton(str(folder), attention, dtype)
    mapped = _Mapped(folder, pieces)
    tied = is_tied(model)
    embedding, head = _hold.edges(config, tied=tied)
    old = model.get_input_embeddings()
    if embedding != "none":
        matrix = mapped.matrix(_name_of(model, old), embedding, old.weight.shape, config)
        _hold.put_edges(model, embedding=matrix, head=matrix if tied else None)
    old = model.get_output_embeddings()
    if head != "none" and not tied:
        _hold.put_edges(model, head=mapped.matrix(_name_of(model, old), head, old.weight.shape, config))
    scheme: Any = quant.get(config.scheme)
    kind = _files.KIND_OF[config.scheme]
    for name, linear in list(_hold.linears(model)):
        packed = mapped.packed(name, kind, (linear.out_features, linear.in_features), config)
        _hold.put(model, name, scheme.layer(config, linear, packed))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            module, _, own = name.rpartition(".")
            read = mapped.plain(name, tuple(parameter.shape)).to(dtype)
            setattr(model.get_submodule(module), own, nn.Parameter(read))
    if tied and embedding == "none":
        model.tie_weights()
    return model


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return str(next(name for name, module in model.named_modules() if module is wanted))


class _Mapped:
    """A folder's tensors, checked against what is expected as they are asked for."""

    def __init__(self, folder: Path, pieces: Mapping[str, Piece]) -> None:
        self._folder = folder
        self._pieces = pieces
        self._open: dict[Path, Any] = {}

    def packed(self, module: str, kind: str, shape: tuple[int, ...], config: Any) -> dict[str, Tensor]:
        """The tensors of a held matrix, as its class names them."""
        rows, columns = shape
        form = _files.FORMS[kind]
        wanted = form.shapes(rows, columns, config)
        tensors = {own: self._checked(f"{module}.{own}", *asked) for own, asked in wanted.items()}
        return form.read(tensors, rows, columns)

    def matrix(self, module: str, kind: str, shape: tuple[int, ...], config: Any) -> Matrix:
        """A held embedding or head."""
        rows, columns = shape
        return _files.MATRICES[kind](rows, columns, self.packed(module, kind, shape, config))

    def plain(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor that isn't held in few bits."""
        return self._checked(name, shape, None)

    def _checked(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        piece = self._pieces.get(name)
        if piece is None:
            raise HpcdlError(f"{self._folder} lacks {name}, which {self._folder / 'config.json'} asks for")
        if piece.shape != shape and -1 not in shape:
            raise HpcdlError(f"{piece} is {piece.shape}, and {shape} by {self._folder / 'config.json'}")
        if piece.dtype != dtype and (dtype is not None or not piece.dtype.is_floating_point):
            wanted = "floating point" if dtype is None else shards.NAMES[dtype]
            raise HpcdlError(f"{piece} is of {shards.NAMES[piece.dtype]}, and should be {wanted}")
        tensor = self._get(piece)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise HpcdlError(f"{piece} has numbers that are infinite or none at all: the file is damaged")
        return tensor

    def _get(self, piece: Piece) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            if piece.file not in self._open:
                self._open[piece.file] = safe_open(str(piece.file), framework="pt")
            tensor: Tensor = self._open[piece.file].get_tensor(piece.name)
        except (OSError, SafetensorError) as error:
            raise HpcdlError(f"{piece} can't be read: {error}") from error
        return tensor


# --- calibrated rounding -----------------------------------------------------------------------------------------


def calibrate(spec: ExperimentSpec, model: Any, device: torch.device, text: Any) -> Any:
    """The model with its blocks rounded by what text says of them; the same on every rank and in every try.

    One process does it and the others read what it has left in the cache: nothing depends on how many threads
    or which processor a node has.

    Args:
        spec: the experiment, whose scheme has `calibration_samples` and `calibrate`.
        model: as loaded, whole; changed.
        device: where text is run through it.
        text: training rows (hpcdl.worker.data.prepare.Rows).

    Raises:
        HpcdlError: there is no text, or a layer can't be held so.
    """
    from hpcdl.worker.pruning import calibration

    config: Any = spec.quant
    scheme: Any = quant.get(config.scheme)
    if text is None:
        raise HpcdlError("quant.calibration_samples looks at text, and there is none here")
    batches = calibration(text, config.calibration_samples, spec.seed)

    def build(folder: Path) -> None:
        from safetensors.torch import save_file

        model.to(device)
        layers = sum(1 for _ in _hold.linears(model))
        told = _Told(layers)
        found = scheme.calibrate(config, model, batches, told)
        model.to("cpu")
        flat = {
            f"{name}|{own}": t.contiguous() for name, packed in found.items() for own, t in packed.items()
        }
        save_file(flat, folder / ROUNDED)

    file = (
        once(cache_dir() / "quantized" / f"calibrated-{_key(config, model, batches, device)}", build)
        / ROUNDED
    )
    packed: dict[str, dict[str, Tensor]] = {}
    for key, tensor in streaming._mapped(file):
        name, _, own = key.partition("|")
        packed.setdefault(name, {})[own] = tensor
    for name, linear in list(_hold.linears(model)):
        if name not in packed:
            raise HpcdlError(f"{file} lacks {name}: delete its folder, and it is made anew")
        _hold.put(model, name, scheme.layer(config, linear, packed[name]))
    return model


class _Told:
    """Tells how far calibration has come: a line a tenth."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._done = 0

    def __call__(self, name: str) -> None:
        before, self._done = self._done, self._done + 1
        if self._done * 10 // self._layers > before * 10 // self._layers:
            print(f"calibrating: {self._done} of {self._layers} layers, {name}", file=sys.stderr, flush=True)


def _key(config: Any, model: Any, batches: Any, device: torch.device) -> str:
    digest = hashlib.blake2b(digest_size=12)
    said = [CALIBRATION, to_plain(config), device.type, str(next(model.parameters()).dtype)]
    digest.update(json.dumps(said).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().data)
    for batch in batches:
        digest.update(batch["input_ids"].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
