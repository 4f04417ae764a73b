"""`hpcdl eval`: how good, how large and how quick a model is."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpcdl.compress import none
from hpcdl.distributed.decoder import Stage
from hpcdl.distributed.losses import IGNORE
from hpcdl.spec import ExperimentSpec
from hpcdl.worker import adapters, model, network, process
from hpcdl.worker.data.prepare import Rows, open_dataset
from hpcdl.worker.evaluate import heldout_batches
from hpcdl.worker.metrics import peak_memory_bytes, resident_peak_bytes
from hpcdl.worker.network import Network
from hpcdl.worker.tools import Request

DECODED = 32
"""Tokens of the prompt and tokens written after it, when decoding is timed."""
WEIGHTS = ("*.safetensors", "*.bin")
"""Files of a model's folder that hold tensors."""


def run(request: Request) -> dict[str, Any]:
    """Held-out loss and perplexity, size on disk and in memory, peak memory, tokens a second.

    The rows and the arithmetic are those of a training's own evaluation: with the same seed, `data`,
    `trainer.eval_samples` and `trainer.precision`, the loss of a model is a run's `eval_loss_before`.

    Raises:
        HpcdlError: the model, its adapter or the data can't be had.
    """
    spec = request.spec
    who = process.from_environment()
    device = process.choose_device(spec, who)
    process.set_threads(spec, who, device)
    place = model.weights_place(spec.model)
    data = open_dataset(spec, model.tokenizer_for(spec.model, place))
    net, heldout = load(request, place, device, data.train), data.heldout
    weights = weights_bytes(net.model)
    found = evaluate(spec, net, heldout)
    return {
        "model": spec.model.name,
        "quant": spec.quant.scheme,
        "precision": spec.trainer.precision,
        "eval_loss": found["loss"],
        "eval_perplexity": math.exp(min(found["loss"], 700.0)),
        "eval_tokens": found["tokens"],
        "parameters": network.size_of(net.model).parameters,
        "disk_bytes": disk_bytes(place, [path for path, _ in request.adapters]),
        "weights_bytes": weights,
        "peak_rss_bytes": resident_peak_bytes(),
        "peak_gpu_bytes": peak_memory_bytes(device) if device.type == "cuda" else None,
        "eval_tokens_per_s": found["tokens_per_s"],
        "decode_tokens_per_s": decoding_speed(net, heldout),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def load(request: Request, place: str | None, device: torch.device, text: Rows | None) -> Network:
    """The model as the spec holds it, with the request's adapters; nothing of it is to be trained.

    Args:
        request: which model, pruned and held how.
        place: where its weights are; None: random.
        device: where it goes.
        text: training rows, for pruning and rounding that look at text.

    Raises:
        HpcdlError: it can't be loaded, or the adapter isn't of this model.
    """
    spec = request.spec
    untrained = replace(spec, peft=none.Config(name="none"))
    net = network.prepare(untrained, model.load(spec, place), device, text)
    made = net.model
    if request.adapters:
        made = adapters.put_on(made, adapters.named(request.adapters))
    made.requires_grad_(False)
    made.eval()
    return Network(model=made.to(device), autocast=net.autocast, device=device)


def evaluate(spec: ExperimentSpec, net: Network, heldout: Rows) -> dict[str, float]:
    """`loss` over the held-out rows (nats a target token), `tokens` of it, `tokens_per_s`.

    The first batch warms up: its time doesn't count, unless it is the only one.
    """
    stage = Stage(net.model)
    batches, targets = heldout_batches(spec, heldout, net.device)
    total, took = 0.0, []
    with torch.no_grad(), net.context():
        for batch in batches:
            started = time.perf_counter()
            total += float(
                stage(batch["input_ids"], batch["position_ids"], batch["labels"])
            )  # waits for a GPU
            took.append((int((batch["labels"] != IGNORE).sum()), time.perf_counter() - started))
    timed = took[1:] or took
    speed = sum(tokens for tokens, _ in timed) / sum(seconds for _, seconds in timed)
    return {"loss": total / targets, "tokens": targets, "tokens_per_s": speed}


class Clock:
    """What `generate` tells of each token as it comes (transformers' streamers)."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """A token has come, or the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """No more will come."""

    def speed(self) -> float | None:
        """Tokens a second, the first left out: it waits for the prompt. None where there is no second."""
        times = self.times[1:]  # before: the prompt itself
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None


def decoding_speed(net: Network, heldout: Rows) -> float | None:
    """Tokens a second of greedy decoding of one sequence, after a prompt of held-out text."""
    prompt = torch.from_numpy(heldout.tokens[:1, :DECODED].astype("int64")).to(net.device)
    clock = Clock()
    with torch.no_grad(), net.context():
        net.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), streamer=clock,
            min_new_tokens=DECODED, max_new_tokens=DECODED, do_sample=False, pad_token_id=0,
        )  # fmt: skip
    return clock.speed()


def disk_bytes(place: str | None, on_top: Sequence[Path]) -> int | None:
    """Bytes of the files that hold the model's tensors, adapters included; None where no folder holds them."""
    if place is None or not Path(place).is_dir():
        return None
    folders = [Path(place), *on_top]
    return sum(file.stat().st_size for folder in folders for kind in WEIGHTS for file in folder.glob(kind))


def weights_bytes(model: nn.Module) -> int:
    """Bytes that hold parameters and buffers: what lies behind several names (tied weights) once."""
    storages = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        for part in plain_parts(tensor):
            storage = part.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def plain_parts(tensor: Any) -> Iterator[Tensor]:
    """The tensors that a tensor is made of: itself, or what a subclass (torchao's) keeps inside."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_parts(getattr(tensor, name))
    else:
        yield tensor
