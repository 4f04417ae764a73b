"""What is done with an export in its runtime's process: scoring text, cutting it into tokens, writing, timing."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcdl.export.runtimes import Model

IGNORE = -100
"""No target, as everywhere (hpcdl.distributed.losses, which imports torch)."""
CHUNK = 64
"""Tokens whose logits are in memory together."""


def peak_bytes() -> int:
    """The highest resident memory that this program has had.

    VmHWM, and not `ru_maxrss`: that is handed on to a program by the process that started it.
    """
    told = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(told.partition("VmHWM:")[2].split()[0]) * 1024


def log_softmax(logits: NDArray[Any]) -> NDArray[Any]:
    """Over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: NDArray[Any] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def score(model: Model, asked: dict[str, Any]) -> dict[str, Any]:
    """Loss over sequences (arrays/text.npz), and the log-probabilities of the first `kept` positions.

    Returns:
        `loss`, a mean over the targets, `targets`; arrays/export.npy is `(kept, vocabulary)`.
    """
    folder = Path(asked["arrays"])
    kept: list[NDArray[np.float32]] = []
    total, targets, want = 0.0, 0, int(asked["kept"])
    for tokens, labels in sequences(folder / "text.npz"):
        model.fresh()
        for at in range(0, len(tokens), CHUNK):
            part = labels[at : at + CHUNK]
            scores = log_softmax(model.feed(tokens[at : at + CHUNK].tolist(), every=True))
            chosen = np.flatnonzero(part != IGNORE)
            total -= float(scores[chosen, part[chosen]].astype(np.float64).sum())
            targets += len(chosen)
            if want:
                kept.append(scores[:want].copy())
                want -= len(kept[-1])
    np.save(folder / "export.npy", np.concatenate(kept))
    return {"loss": total / targets, "targets": targets, "vocabulary": model.vocabulary}


def sequences(path: Path) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Tokens and targets of each sequence, equally long."""
    with np.load(path) as found:
        tokens, labels, ends = found["tokens"], found["labels"], found["ends"]
    for first, last in itertools.pairwise([0, *ends.tolist()]):
        yield tokens[first:last], labels[first:last]


def tokenize(model: Model, asked: dict[str, Any]) -> dict[str, Any]:
    """Tokens of each text, and what the export says of its special ones."""
    ids = [model.encode(text) for text in asked["texts"]]
    back = [model.decode(each).decode("utf-8", errors="replace") for each in ids]
    return {
        "ids": ids,
        "back": back,
        "eos": model.eos,
        "prefix": list(model.prefix),
        "template": model.template,
    }


def generate(model: Model, asked: dict[str, Any]) -> dict[str, Any]:
    """How the export goes on from a text; greedy where the temperature is 0, else nucleus sampling."""
    text = asked["prompt"]
    if asked["chat"]:
        text = in_template(model.template, text)
    prompt = [*model.prefix, *model.encode(text)]
    if len(prompt) + asked["tokens"] > asked["context"]:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens: with {asked['tokens']} more over {asked['context']}"
        )
    draw = np.random.default_rng(asked["seed"])
    started = time.perf_counter()
    written, times = [], []
    for token in _written(model, prompt, asked, draw):
        times.append(time.perf_counter())
        if token == model.eos:
            break
        written.append(token)
    return {
        "text": model.decode(written).decode("utf-8", errors="replace"), "tokens": len(written),
        "prompt_tokens": len(prompt), "first_token_s": times[0] - started,
        "tokens_per_s": (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
    }  # fmt: skip


def _written(
    model: Model, prompt: Sequence[int], asked: dict[str, Any], draw: np.random.Generator
) -> Iterator[int]:
    model.fresh()
    logits = model.feed(prompt)
    for number in range(asked["tokens"]):
        token = _chosen(logits, asked["temperature"], asked["top_p"], draw)
        yield token
        if number + 1 < asked["tokens"]:
            logits = model.feed([token])


def _chosen(logits: NDArray[np.float32], temperature: float, top_p: float, draw: np.random.Generator) -> int:
    """Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020."""
    if not temperature:
        return int(logits.argmax())
    chances = np.exp(log_softmax(logits.astype(np.float64) / temperature))
    order = np.argsort(-chances, kind="stable")
    sums = np.cumsum(chances[order])
    likely = order[: int(np.searchsorted(sums, top_p * sums[-1])) + 1]
    return int(draw.choice(likely, p=chances[likely] / chances[likely].sum()))


def in_template(template: str | None, question: str) -> str:
    """The question as the chat template has it, ended by the start of an answer."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if template is None:
        raise ValueError("it has no chat template: leave --chat out")
    room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": "user", "content": question}]
    words = {"bos_token": "", "eos_token": "", "add_generation_prompt": True}
    return str(room.from_string(template).render(messages=messages, **words))


def bench(model: Model, asked: dict[str, Any]) -> dict[str, Any]:
    """Prompt and generation, timed `repeats` times after a warm-up; medians."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, min(model.vocabulary, 256), asked["prompt_tokens"]).tolist()
    first, reading, writing = [], [], []
    for number in range(asked["repeats"] + 1):
        model.fresh()
        started = time.perf_counter()
        token = int(model.feed(prompt).argmax())
        read = time.perf_counter()
        for _ in range(asked["tokens"]):
            token = int(model.feed([token]).argmax())
        ended = time.perf_counter()
        if number:
            first.append(read - started)
            reading.append(len(prompt) / (read - started))
            writing.append(asked["tokens"] / (ended - read))
    return {
        "first_token_s": float(np.median(first)), "prompt_tokens_per_s": float(np.median(reading)),
        "tokens_per_s": float(np.median(writing)),
    }  # fmt: skip
