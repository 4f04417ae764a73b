"""Reads a checkpoint's tensors: their names and shapes, and a whole model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load

from hpcdl.distributed.decoder import Stage, named_parameters
from hpcdl.worker.unpickle import SafeReader


def saved_tensors(path: Path) -> Mapping[str, Any]:
    """The tensors in a checkpoint: DCP's TensorStorageMetadata by name."""
    saved: Mapping[str, Any] = SafeReader(path).read_metadata().state_dict_metadata
    return saved


def load_weights(path: Path, model: nn.Module) -> None:
    """Sets a whole model's trained parameters to a checkpoint's, whoever wrote it. One rank alone."""
    state = {
        f"model.{name}": parameter.detach()
        for name, parameter in named_parameters(Stage(model)).items()
        if parameter.requires_grad
    }
    saved_tensors(path)  # what is wrong with the index is said by itself; below, torch would frame it
    load(state, storage_reader=SafeReader(path), no_dist=True)
