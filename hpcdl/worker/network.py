"""From the loaded model to what is trained: fine-tuning method, activation checkpointing, compile, strategy."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpcdl import compress, parallel
from hpcdl.errors import HpcdlError
from hpcdl.spec import ExperimentSpec
from hpcdl.worker.losses import WithLoss, inner
from hpcdl.worker.metrics import flops_per_token, peak_flops

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True)
class Network:
    """The model under its wrappers."""

    model: Any
    """transformers' model, or peft's around it: what is saved, and what generates text."""
    wrapped: nn.Module
    """WithLoss under the strategy's wrapper: what is called and trained."""
    autocast: bool
    """Whether passes run in bf16 (`trainer.precision`)."""
    device: torch.device

    def trainable(self) -> list[nn.Parameter]:
        """Parameters that are trained."""
        return [p for p in self.wrapped.parameters() if p.requires_grad]

    def context(self) -> AbstractContextManager[Any]:
        """bf16 autocast, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Holds back the gradients' reduction for all but the last micro-batch, where the strategy can."""
        no_sync = getattr(self.wrapped, "no_sync", None)
        return nullcontext() if last or no_sync is None else no_sync()


def build(spec: ExperimentSpec, model: Any, mesh: DeviceMesh, device: torch.device) -> Network:
    """Puts everything around the loaded model, in the order that each part needs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)  # LoRA's A starts random: the same on every rank
        model = compress.get(spec.peft.name).apply(spec.peft, model)
    model.to(device)
    checkpoint_activations(model, spec.trainer.activation_checkpointing)
    if spec.trainer.compile:
        for block in blocks(inner(model)):
            block.compile()
    net = WithLoss(model)
    wrapped = parallel.get(spec.parallel.name).apply(spec.parallel, net, mesh)
    return Network(model=model, wrapped=wrapped, autocast=spec.trainer.precision == "bf16", device=device)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's blocks: the longest list of modules.

    Raises:
        HpcdlError: the model has none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise HpcdlError(f"{type(model).__name__} has no list of blocks to checkpoint or compile")
    return max(lists, key=len)


def checkpoint_activations(model: Any, how: str) -> None:
    """Has blocks recompute their activations in the backward pass: all (`full`), every second (`selective`).

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    if how == "none":
        return
    base = inner(model)
    # Not reentrant: works with frozen inputs (LoRA) and with DDP; RNG is kept, so dropout is the same.
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # renamed in transformers 5.2x; the old name serves all of 5
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if how == "selective":
        for block in list(blocks(base))[1::2]:
            setattr(block, "gradient_checkpointing", False)  # noqa: B010


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters, and those that are trained; tied ones once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def seconds_at_peak(spec: ExperimentSpec, net: Network, world_size: int) -> float | None:
    """Seconds that a token would take with every device at its peak: tokens/s times this is the MFU.

    None where the peak isn't known.
    """
    peak = peak_flops(net.device, bf16=net.autocast)
    if peak is None:
        return None
    config = inner(net.model).config
    parameters, trainable = count_parameters(net.model)
    flops = flops_per_token(
        parameters, trainable, config.num_hidden_layers, config.hidden_size, spec.data.seq_len
    )
    return flops / (peak * world_size)
