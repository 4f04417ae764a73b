"""`hpcdl generate`: how a model goes on from a text."""

from __future__ import annotations

import time
from typing import Any

import torch

from hpcdl.runs.words import size
from hpcdl.worker import model, process, tasks
from hpcdl.worker.data.prepare import open_dataset
from hpcdl.worker.metrics import peak_memory_bytes, resident_peak_bytes
from hpcdl.worker.tools import Request
from hpcdl.worker.tools.eval import Clock, load


def run(request: Request) -> dict[str, Any]:
    """The continuation, seconds of loading, tokens a second after the first, highest memory.

    Greedy where the temperature is 0: the same text each time. Else drawn from softmax(logits / temperature), cut to
    the likeliest tokens that together have the probability `top_p` (Holtzman et al., "The Curious Case of Neural
    Text Degeneration", ICLR 2020).

    Raises:
        HpcdlError: the model or its adapter can't be had.
    """
    spec, asked = request.spec, request.options
    who = process.from_environment()
    device = process.choose_device(spec, who)
    process.set_threads(spec, who, device)
    place = model.weights_place(spec.model)
    tokenizer = model.tokenizer_for(spec.model, place)
    needs_text = spec.prune.name != "none" or bool(getattr(spec.quant, "calibration_samples", None))
    text = open_dataset(spec, tokenizer).train if needs_text else None
    model.import_library()
    started = time.perf_counter()
    net = load(request, place, device, text)
    load_s = time.perf_counter() - started
    # as each of the two is trained: a text that goes on, or a question in the chat template
    prompt = tasks.get("sft" if asked["chat"] else "pretrain").prompt(asked["prompt"], tokenizer)
    ids = torch.tensor([prompt], device=device)
    how: dict[str, Any] = {"do_sample": False}
    if asked["temperature"]:
        how = {"do_sample": True, "temperature": asked["temperature"], "top_p": asked["top_p"], "top_k": 0}
    torch.manual_seed(asked["seed"])
    clock = Clock()
    with torch.no_grad(), net.context():
        out = net.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), streamer=clock, max_new_tokens=asked["tokens"],
            eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id, **how,
        )  # fmt: skip
    written = out[0, len(prompt) :].tolist()
    return {
        "prompt": asked["prompt"],
        "text": tokenizer.decode(written),
        "tokens": len(written),
        "load_s": round(load_s, 3),
        "tokens_per_s": clock.speed(),
        "peak_rss_bytes": resident_peak_bytes(),
        "peak_gpu_bytes": peak_memory_bytes(device) if device.type == "cuda" else None,
    }


def as_text(found: dict[str, Any]) -> str:
    """The text as it reads, and a line about how it was made."""
    speed = found["tokens_per_s"]
    facts = [
        f"{found['tokens']} tokens",
        *([f"{speed:.1f} tokens/s"] if speed else []),
        f"loaded in {found['load_s']:.1f} s",
        f"peak memory {size(found['peak_rss_bytes'])}",
        *([f"on the GPU {size(found['peak_gpu_bytes'])}"] if found["peak_gpu_bytes"] else []),
    ]
    return f"{found['prompt']}▸{found['text']}\n\n{', '.join(facts)}"
