"""The model of `offload=stream`: on a shelf from its first byte to its last, never whole in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hpcdl.compress.offload import stream
from hpcdl.distributed import shards
from hpcdl.distributed.decoder import named_parameters
from hpcdl.distributed.engine import Engine
from hpcdl.distributed.mesh import Grid
from hpcdl.distributed.parallelize import Job
from hpcdl.distributed.residence import Residence
from hpcdl.distributed.shelf import Shelf
from hpcdl.errors import HpcdlError
from hpcdl.spec import ExperimentSpec
from hpcdl.worker import model as models
from hpcdl.worker import streaming
from hpcdl.worker.network import Network

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PART = 2**23
"""Numbers that are read at a time."""
FOLDER = "stream"
"""Of the run directory: where the working file lies, unless the config says."""


@dataclass(frozen=True, slots=True)
class StreamedNetwork(Network):
    """A network whose weights are on a shelf; its model can be called all the same, layer by layer."""

    residence: Residence
    keep_on_shelf: bool
    """Whether the layers' inputs wait there for the backward pass."""

    def trainable(self) -> Iterator[nn.Parameter]:
        """All parameters, one at a time."""
        for parameter in self.model.parameters():
            yield parameter
            self.residence.shelf.release(self.residence.home(parameter))

    def to_device(self) -> None:
        """Layers come when they are called."""

    def takes_tokens_on(self) -> torch.device:
        """The device, though the weights lie elsewhere."""
        return self.device

    def engine(self, spec: ExperimentSpec, grid: Grid, job: Job) -> Engine:
        """The engine that has the layers pass through."""
        from hpcdl.distributed.stream import StreamEngine

        return StreamEngine(self.residence, grid, job, keep_on_shelf=self.keep_on_shelf)

    def save(self, model: Any, folder: Path) -> None:
        """Writes what transformers' `from_pretrained` reads, piece by piece."""
        folder.mkdir(parents=True, exist_ok=True)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = next(model.parameters()).dtype
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        shelf = self.residence.shelf
        shards.save(folder, self.residence.homes, shelf.release)


def prepare(spec: ExperimentSpec, place: str | None, run: Path, device: torch.device) -> StreamedNetwork:
    """The model on its shelf.

    Args:
        spec: the experiment.
        place: what `model.weights_place` gave.
        run: the run directory.
        device: where layers are computed.

    Raises:
        HpcdlError: the weights can't be had, or there is no room for the working file.
    """
    config = spec.offload
    assert isinstance(config, stream.Config), "whose STREAMS is set"
    on_disk = config.device == "disk"
    folder = _folder(config.folder, run) if on_disk else None
    shelf = Shelf(folder, pin=device.type == "cuda")
    dtype = DTYPES[config.weights]
    model = _random(spec, shelf, folder, dtype) if place is None else _from_files(spec, place, shelf, dtype)
    residence = Residence(model, shelf, device, read_ahead=config.read_ahead)
    return StreamedNetwork(
        model=model,
        autocast=spec.trainer.precision == "bf16",
        device=device,
        residence=residence,
        keep_on_shelf=config.activations == "disk",
    )


def _folder(given: str | None, run: Path) -> Path:
    return run / FOLDER if given is None else run / Path(os.path.expandvars(given)).expanduser()


def _from_files(spec: ExperimentSpec, place: str, shelf: Shelf, dtype: torch.dtype) -> Any:
    """A pretrained model: its skeleton from config.json, its weights tensor by tensor."""
    folder = _local(place, spec.model.revision)
    skeleton = streaming.skeleton(str(folder), spec.model.attention, dtype)
    found = shards.pieces(folder)
    for name, parameter in list(named_parameters(skeleton).items()):
        if name not in found:
            raise HpcdlError(f"{folder} lacks {name}, which config.json asks for")
        piece = found[name]
        if piece.shape != tuple(parameter.shape) or not piece.dtype.is_floating_point:
            raise HpcdlError(
                f"{piece} is {piece.shape} of {piece.dtype}, and {tuple(parameter.shape)} by config.json"
            )
        home = shelf.new(parameter.shape, dtype)
        at, flat = 0, home.view(-1)
        for part in piece.parts(PART):
            flat[at : at + len(part)].copy_(part)
            shelf.release(flat[at : at + len(part)])
            at += len(part)
        _put(skeleton, name, home)
    skeleton.tie_weights()
    return skeleton.train()


def _local(place: str, revision: str | None) -> Path:
    """The folder of a model's files; fetched from the hub where it is an id."""
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(place, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise HpcdlError(f"model.hub_id={place} can't be fetched: {error}") from error


def _random(spec: ExperimentSpec, shelf: Shelf, folder: Path | None, dtype: torch.dtype) -> Any:
    """Random weights, the very ones that ordinary training begins with."""
    assert spec.model.shape is not None, "checked before submission"
    # Drawn in fp32 as everywhere; on a shelf of their own where they then are to be rounded.
    first = shelf if dtype == torch.float32 else Shelf(folder)
    with OnShelf(first):
        model = models.from_shape(spec.model.shape, spec.model.attention, spec.seed)
    for name, parameter in list(named_parameters(model).items()):
        if first is shelf and shelf.has(parameter):
            continue
        home = shelf.new(parameter.shape, dtype)
        home.copy_(parameter.detach())
        _put(model, name, home)
        first.release(parameter.detach())
        shelf.release(home)
    model.tie_weights()
    return model


def _put(model: nn.Module, name: str, home: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(home))


class OnShelf(TorchFunctionMode):
    """Modules that are made now have their matrices on a shelf, and let them go after each operation."""

    def __init__(self, shelf: Shelf) -> None:
        super().__init__()
        self._shelf = shelf

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Gives `torch.empty` a place on the shelf; all else is as it was, and its tensor let go."""
        kwargs = kwargs or {}
        if func is torch.empty and len(args) == 1 and isinstance(args[0], tuple) and len(args[0]) > 1:
            return self._shelf.new(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._shelf.release(result.detach())
        return result
