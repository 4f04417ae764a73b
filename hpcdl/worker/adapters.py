"""Adapters on a model: several by name, each with a weight; and what they add to each matrix.

What they stand for together is W + Σ weight · update, for a weighted sum of tasks too (Ilharco et al., "Editing
Models with Task Arithmetic", ICLR 2023). An update is B·A·alpha/rank (LoRA), B·A·alpha/√rank (rsLoRA), or
m · V/‖V‖ - W with V = W + B·A·alpha/rank (DoRA), which has no weight but 1: it is no direction.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpcdl.distributed.shards import header
from hpcdl.errors import HpcdlError
from hpcdl.foreign import refuse_imports

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""peft's, before the names of the model underneath."""
PARTS = {".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_magnitude_vector": "lengths"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One adapter, and how much it counts."""

    path: Path
    """Folder with adapter_config.json."""
    weight: float = 1.0
    """Factor of its update."""
    name: str = "default"
    """What it is called on the model."""


def named(adapters: Iterable[tuple[Path, float]]) -> tuple[Adapter, ...]:
    """Adapters with names that differ: the experiment's or the folder's, with a number where they are alike."""
    found: dict[str, Adapter] = {}
    for path, weight in adapters:
        # runs/NAME/ID/adapter
        plain = path.parent.parent.name if path.name == "adapter" else path.name
        plain = plain.replace(".", "_") or "adapter"
        name, number = plain, 2
        while name in found:
            name, number = f"{plain}_{number}", number + 1
        found[name] = Adapter(path=path, weight=weight, name=name)
    return tuple(found.values())


def put_on(model: nn.Module, adapters: Sequence[Adapter]) -> Any:
    """The model under adapters that act together, frozen; `set_adapter(name)` has one of them act alone.

    Raises:
        HpcdlError: an adapter isn't of this model, or can't have its weight.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    made: Any = model
    for number, adapter in enumerate(adapters):
        # What is torn, or can't be added up, says so by itself. One adapter alone may be anything that peft reads.
        if len(adapters) > 1 or adapter.weight != 1:
            Update(adapter)
        elif (adapter.path / WEIGHTS).exists():
            header(adapter.path / WEIGHTS)
        refuse_imports(adapter.path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5 by an old name
                if number:
                    made.load_adapter(str(adapter.path), adapter.name)
                else:
                    made = PeftModel.from_pretrained(made, str(adapter.path), adapter.name)
        except (OSError, ValueError, RuntimeError) as error:
            raise HpcdlError(f"{adapter.path} doesn't go on this model: {error}") from error
    made.base_model.set_adapter([adapter.name for adapter in adapters], inference_mode=True)
    for layer in made.modules():
        if isinstance(layer, LoraLayer):
            for adapter in adapters:
                if adapter.weight != 1:
                    layer.set_scale(adapter.name, adapter.weight)
    return made.requires_grad_(False).eval()


class Update:
    """What an adapter's files add to each matrix."""

    def __init__(self, adapter: Adapter) -> None:
        """Reads its config and its file's header.

        Raises:
            HpcdlError: it is torn, or not one that is an update of matrices only.
        """
        self.adapter = adapter
        try:
            self.config: dict[str, Any] = json.loads((adapter.path / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise HpcdlError(f"{adapter.path / CONFIG} can't be read: {error}") from error
        self._refuse()
        self.file = adapter.path / WEIGHTS
        self._pieces = header(self.file)
        self.modules: dict[str, dict[str, str]] = {}
        """By the matrix's name in the model: its tensors' names in the file, as PARTS calls them."""
        for name in self._pieces:
            part = next((part for part in PARTS if name.endswith(part)), None)
            if part is None or not name.startswith(PREFIX):
                raise HpcdlError(
                    f"{self.file}: {name} is no part of an update of a matrix, which is all that is merged"
                )
            matrix = f"{name.removesuffix(part).removeprefix(PREFIX)}.weight"
            self.modules.setdefault(matrix, {})[PARTS[part]] = name
        wanted = {"a", "b", "lengths"} if self.config.get("use_dora") else {"a", "b"}
        for matrix, parts in self.modules.items():
            if parts.keys() != wanted:
                raise HpcdlError(f"{self.file} lacks {', '.join(sorted(wanted - parts.keys()))} of {matrix}")

    def _refuse(self) -> None:
        config, path = self.config, self.adapter.path
        reasons = {
            f"is no LoRA but {config.get('peft_type')}": config.get("peft_type") != "LORA",
            "trains biases too": config.get("bias", "none") != "none" or bool(config.get("lora_bias")),
            "has changed its base": config.get("init_lora_weights") not in (True, False, None, "gaussian"),
            "repeats layers": bool(config.get("layer_replication")),
            "trains whole modules too": bool(config.get("modules_to_save")),
        }
        for reason, holds in reasons.items():
            if holds:
                raise HpcdlError(f"{path} {reason}: it can't be put on another copy of its base, or merged")
        if config.get("use_dora") and self.adapter.weight != 1:
            raise HpcdlError(
                f"{path} is DoRA, which sets the lengths of rows: no part of it can be taken (weight"
                f" {self.adapter.weight:g}); only 1"
            )

    def of(self, matrix: str, base: Tensor) -> Tensor:
        """What is added to a matrix.

        Args:
            matrix: its name, `model.layers.0.self_attn.q_proj.weight`.
            base: it itself in fp32, `(rows, columns)`.

        Raises:
            HpcdlError: the adapter is of matrices of another size.
        """
        parts = {part: self._pieces[name].read().float() for part, name in self.modules[matrix].items()}
        a, b = parts["a"], parts["b"]
        update = (b @ a) * self._scale(matrix.removesuffix(".weight"), len(a))
        if self.config.get("fan_in_fan_out"):
            update = update.T
        if update.shape != base.shape:
            raise HpcdlError(
                f"{self.file}: its update of {matrix} is {tuple(update.shape)}, and the matrix is"
                f" {tuple(base.shape)}: it is of another model"
            )
        if "lengths" in parts:
            whole = update.add_(base)
            return whole.mul_((parts["lengths"] / torch.linalg.vector_norm(whole, dim=1))[:, None]).sub_(base)
        return update.mul_(self.adapter.weight)

    def _scale(self, module: str, rank: int) -> float:
        from peft.utils.other import get_pattern_key

        patterns = self.config.get("alpha_pattern") or {}
        alpha = float(patterns.get(get_pattern_key(list(patterns), module), self.config["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
