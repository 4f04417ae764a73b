"""From the loaded model to what is trained: the fine-tuning method, then the strategy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpcdl import compress, parallel
from hpcdl.compress import quant
from hpcdl.distributed.decoder import inner
from hpcdl.distributed.engine import Engine
from hpcdl.distributed.held import parameter_count
from hpcdl.distributed.mesh import Grid
from hpcdl.distributed.parallelize import Job
from hpcdl.spec import ExperimentSpec
from hpcdl.worker import optim, pruning, quantized
from hpcdl.worker.data.prepare import Rows
from hpcdl.worker.metrics import flops_per_token, peak_flops
from hpcdl.worker.model import load


@dataclass(frozen=True, slots=True)
class Network:
    """A whole model on one rank: what generates text and is saved."""

    model: Any
    """transformers' model, or peft's around it."""
    autocast: bool
    """Whether passes run in bf16 (`trainer.precision`)."""
    device: torch.device

    def trainable(self) -> Iterator[nn.Parameter]:
        """Parameters that are trained."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def to_device(self) -> None:
        """Moves the whole model to the device."""
        self.model.to(self.device)

    def takes_tokens_on(self) -> torch.device:
        """Where the model wants its tokens."""
        return next(iter(self.model.parameters())).device  # type: ignore[no-any-return]

    def engine(self, spec: ExperimentSpec, grid: Grid, job: Job) -> Engine:
        """The strategy's engine."""
        return parallel.get(spec.parallel.name).build(spec.parallel, self.model, grid, job)

    def save(self, model: Any, folder: Path) -> None:
        """Writes a whole model, mostly this network's own, as transformers' `from_pretrained` reads it."""
        model.save_pretrained(folder)

    def context(self) -> AbstractContextManager[Any]:
        """bf16 autocast, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a model counts; tied parameters once."""

    parameters: int
    trainable: int
    layers: int
    hidden_size: int


def prepare(spec: ExperimentSpec, model: Any, device: torch.device, text: Rows | None = None) -> Network:
    """The loaded model pruned, its weights held as asked for, under the fine-tuning method; the same on every rank.

    Args:
        spec: the experiment.
        model: as loaded.
        device: where text is run through it.
        text: training rows, for pruning and rounding that look at text.
    """
    zeros = pruning.apply(spec, model, device, text)
    if getattr(spec.quant, "calibration_samples", 0):
        model = quantized.calibrate(spec, model, device, text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)  # LoRA's A starts random: the same on every rank
        model = quant.hold(spec, model)
        model = compress.get(spec.peft.name).apply(spec.peft, model)
    pruning.keep(model, zeros)
    return Network(model=model, autocast=spec.trainer.precision == "bf16", device=device)


def parallelize(spec: ExperimentSpec, net: Network, grid: Grid) -> Engine:
    """The strategy's engine; the network's model is taken apart, unless every rank holds it whole."""
    ranks = grid.dims.data_ranks
    job = Job(
        make_optimizer=lambda parameters: optim.build(spec.optim, parameters),
        autocast=net.autocast,
        checkpointing=spec.trainer.activation_checkpointing,
        offload=spec.trainer.activation_offload,
        compile=spec.trainer.compile,
        micro_batches=spec.trainer.global_batch_size // (spec.trainer.micro_batch_size * ranks),
        micro_batch_size=spec.trainer.micro_batch_size,
        seq_len=spec.data.seq_len,
        seed=spec.seed,
        max_steps=spec.trainer.max_steps,
    )
    return net.engine(spec, grid, job)


def from_checkpoint(
    spec: ExperimentSpec, place: str | None, path: Path, device: torch.device, text: Rows | None = None
) -> Network:
    """The trained model, whole, on this rank alone: loaded anew, with a checkpoint's weights.

    It goes to `device` where there is room for it: what was shared out since no GPU could hold it stays on the CPU.
    """
    from hpcdl.worker.reading import load_weights  # torch's checkpoints take half a second to import

    net = prepare(spec, load(spec, place), device, text)
    load_weights(path, net.model)
    net = replace(net, device=_with_room(net.model, device))
    net.to_device()
    return net


def _with_room(model: nn.Module, device: torch.device) -> torch.device:
    """`device`, or the CPU where the whole model and a tenth more doesn't fit into what that GPU has free."""
    if device.type != "cuda":
        return device
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    needed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return device if 1.1 * needed < free else torch.device("cpu")


def merged(spec: ExperimentSpec, net: Network, place: str | None, text: Rows | None = None) -> Any:
    """The whole model with its adapter in its weights, in the precision of the base before quantization.

    Where the base is held in fewer bits, it is loaded (and pruned) anew: an update is merged into plain weights.

    Args:
        spec: the experiment.
        net: the trained model under peft; taken apart where its base is plain.
        place: what the base was loaded from.
        text: training rows, for pruning that looks at text.
    """
    whole = net.model
    if spec.quant.scheme != "none":
        plain = pruning.unquantized(spec)
        whole = prepare(plain, load(plain, place), net.device, text).model
        trained = dict(net.model.named_parameters())
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(trained[name])
    return whole.merge_and_unload()


def size_of(model: Any) -> Size:
    """Counts a whole model."""
    config = inner(model).config
    return Size(
        parameters=parameter_count(model),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
    )


def seconds_at_peak(spec: ExperimentSpec, size: Size, device: torch.device, world_size: int) -> float | None:
    """Seconds that a token would take with every device at its peak: tokens/s times this is the MFU.

    None where the peak isn't known.
    """
    peak = peak_flops(device, bf16=spec.trainer.precision == "bf16")
    if peak is None:
        return None
    flops = flops_per_token(size.parameters, size.trainable, size.layers, size.hidden_size, spec.data.seq_len)
    return flops / (peak * world_size)
