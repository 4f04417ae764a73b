"""A loaded model → one with zeros, the same on every rank and in every try; zeros that stay while it is trained.

What needs text is done by one process and kept in the cache: its masks in bits, and the weights that stay where
the method changes them. All ranks, and a run that goes on, read the same: nothing depends on how many threads
or what processor another node has. What the key is made of is all that the zeros depend on: every weight, the
calibration tokens, the method's config.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpcdl.compress import prune, quant
from hpcdl.compress.prune import _masks, _zeros
from hpcdl.compress.prune._common import sparsity_at
from hpcdl.distributed import zeros as zeros_kept
from hpcdl.errors import HpcdlError
from hpcdl.runs.files import write_json
from hpcdl.runs.store import RunDir
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.plain import to_plain
from hpcdl.worker.cache import cache_dir, once
from hpcdl.worker.data.batches import batch
from hpcdl.worker.data.pack import PAD
from hpcdl.worker.data.prepare import Rows

VERSION = 1
"""Part of the cache's name: raise it when the same model and text become other zeros."""
STREAM = 0x0BD
"""Tells the calibration's draws from others of the same seed."""
MASKS = "masks.safetensors"

Zeros = dict[str, Tensor | None]
"""Pruned layers by name; their masks in bits where quantization will blur them."""


def apply(spec: ExperimentSpec, model: Any, device: torch.device, text: Rows | None) -> Zeros:
    """Takes weights out of the loaded model, in place.

    Args:
        spec: the experiment.
        model: transformers' model, whole, not quantized yet.
        device: where calibration runs.
        text: training rows, for methods that look at text.

    Raises:
        HpcdlError: the method needs text and there is none, or the model is one that it can't prune.
    """
    if spec.prune.name == "none":
        return {}
    if getattr(spec.prune, "schedule", "once") == "once":
        take_out(spec, model, device, text)
    blurred = spec.quant.scheme != "none"
    return {
        name: _zeros.pack(layer.weight.detach() != 0) if blurred else None
        for name, layer in _masks.linears(model).items()
    }


def take_out(spec: ExperimentSpec, model: Any, device: torch.device, text: Rows | None) -> None:
    """Prunes a model to `spec.prune.sparsity` now, in place; the same on every rank that has the same weights."""
    method = prune.get(spec.prune.name)
    if not method.CALIBRATED:
        method.apply(spec.prune, model, ())
        return
    if text is None:
        raise HpcdlError(f"prune={spec.prune.name} looks at text, and there is none here")
    batches = calibration(text, spec.prune.calibration_samples, spec.seed)  # type: ignore[attr-defined]
    folder = cache_dir() / "pruned" / f"{spec.prune.name}-{_key(spec, model, batches, device)}"
    once(folder, lambda path: _build(path, spec, model, device, batches))
    _read(folder / MASKS, _masks.linears(model))


class Gradual:
    """Pruning that goes on while a model is trained (`prune.schedule`). Every rank has the whole model."""

    def __init__(self, spec: ExperimentSpec, run: RunDir | None, model: Any, text: Rows) -> None:
        """Does nothing yet.

        Args:
            spec: the experiment.
            run: told of each pruning; None: not by this rank.
            model: the live one.
            text: training rows.
        """
        self._spec = spec
        self._run = run
        self._model = model
        self._text = text

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Takes out more where it is time: then the weights' optimizer state goes too, or it would move them."""
        share = sparsity_at(self._spec.prune, step, self._spec.trainer.max_steps)  # type: ignore[arg-type]
        if share is None:
            return
        layers = _masks.linears(self._model)
        device = next(self._model.parameters()).device
        now = replace(self._spec, prune=replace(self._spec.prune, sparsity=share))  # type: ignore[call-arg]
        take_out(now, self._model, device, self._text)
        for layer in layers.values():
            for value in optimizer.state[layer.weight].values():
                if isinstance(value, Tensor) and value.shape == layer.weight.shape:
                    value.mul_(layer.weight.detach() != 0)
        if self._run is not None:
            self._run.event("pruned", step=step, sparsity=round(_masks.sparsity(layers), 6))


def gradual(spec: ExperimentSpec, run: RunDir | None, net: Any, text: Rows) -> Gradual | None:
    """What prunes a network while training goes on; None where nothing does."""
    return Gradual(spec, run, net.model, text) if getattr(spec.prune, "schedule", "once") != "once" else None


def calibration(text: Rows, samples: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of one training sequence each, drawn by the seed; all rows where there are fewer.

    Returns:
        `input_ids`, `position_ids`, `labels` and `real` (where they are no padding), each `(1, seq_len)`.
    """
    chosen = np.random.default_rng([seed, STREAM]).permutation(len(text))[:samples]
    made = []
    for row in chosen:
        rows = np.array([row])
        one = batch(text, rows, torch.device("cpu"))
        one["real"] = torch.from_numpy((text.flags[rows][:, :-1] & PAD) == 0)
        made.append(one)
    return made


def _key(
    spec: ExperimentSpec, model: Any, batches: Sequence[Mapping[str, Tensor]], device: torch.device
) -> str:
    digest = hashlib.blake2b(digest_size=12)
    dtype = str(next(model.parameters()).dtype)
    said = [VERSION, to_plain(spec.prune), device.type, dtype, spec.trainer.precision]
    digest.update(json.dumps(said).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    for one in batches:
        for name in sorted(one):
            digest.update(one[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _build(
    folder: Path,
    spec: ExperimentSpec,
    model: Any,
    device: torch.device,
    batches: Sequence[Mapping[str, Tensor]],
) -> None:
    """Prunes the model, and writes what `_read` needs to do the same to another copy of it."""
    from safetensors.torch import save_file

    method, home = prune.get(spec.prune.name), next(model.parameters()).device
    model.to(device)
    bf16 = spec.trainer.precision == "bf16"
    with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
        method.apply(spec.prune, model, batches)
    model.to(home)
    found: dict[str, Tensor] = {}
    layers = _masks.linears(model)
    for name, layer in layers.items():
        kept = layer.weight.detach() != 0
        found[f"{name}.kept"] = _zeros.pack(kept).cpu()
        if method.REWEIGHTS:
            found[f"{name}.weights"] = layer.weight.detach()[kept].cpu()
    save_file(found, folder / MASKS)
    write_json(folder / "prune.json", {**to_plain(spec.prune), "sparsity_reached": _masks.sparsity(layers)})


@torch.no_grad()
def _read(path: Path, layers: Mapping[str, nn.Linear]) -> None:
    """Gives each layer the zeros, and the weights, of the file.

    Raises:
        HpcdlError: the file is broken.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            for name, layer in layers.items():
                weight = layer.weight
                bits = file.get_tensor(f"{name}.kept").to(weight.device)
                kept = _zeros.unpack(bits, weight.numel()).view(weight.shape)
                if f"{name}.weights" in there:
                    weight.zero_()[kept] = file.get_tensor(f"{name}.weights").to(weight.device)
                else:
                    _masks.take_out(layer, kept)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise HpcdlError(f"{path} is broken ({error}): delete its folder, and it is made anew") from error


def keep(model: Any, zeros: Zeros) -> None:
    """Has the zeros stay while the model is trained: after quantization and the fine-tuning method.

    Args:
        model: transformers' model, or peft's around it.
        zeros: what `apply` gave.
    """
    if not zeros:
        return
    for name, module in model.named_modules():
        plain = name.removeprefix("base_model.model.")
        if plain not in zeros:
            continue
        if hasattr(module, "lora_A"):
            _zeros.mask_update(module, zeros[plain])
        elif any(p.requires_grad for p in module.parameters()):
            zeros_kept.keep(module)


def sparsity(model: Any) -> dict[str, float]:
    """Shares of zeros: among the blocks' linear layers, and among all parameters (tied ones once)."""
    layers = _masks.linears(model)
    every = list(model.parameters())
    zeros = sum(int((p == 0).sum()) for p in every)
    return {
        "sparsity": round(_masks.sparsity(layers), 6),
        "sparsity_of_model": round(zeros / sum(p.numel() for p in every), 6),
    }


def unquantized(spec: ExperimentSpec) -> ExperimentSpec:
    """The same experiment with plain weights: what an update is merged into."""
    return replace(spec, quant=quant.get("none").Config(scheme="none"))
