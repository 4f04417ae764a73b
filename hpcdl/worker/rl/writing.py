"""Answers, many at a time, with a cache of keys and values, under any data-parallel strategy.

What is drawn is a function of numbers that the caller gives: the same answers whatever rank writes them. Sharded
weights (FSDP) are gathered once for all answers of an iteration, and let go after: while it writes, a rank holds the
whole model, but no gradients and no activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpcdl.worker.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How answers are written."""

    most: int
    """Tokens, the end included."""
    temperature: float
    eos_id: int
    pad_id: int


def manner(tokenizer: Tokenizer, most: int, temperature: float) -> Manner:
    """In a tokenizer's words."""
    return Manner(most=most, temperature=temperature, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)


@torch.no_grad()
def write(stage: nn.Module, prompts: Sequence[Sequence[int]], how: Manner, chances: Tensor | None) -> Tensor:
    """Answers to some prompts, `(prompts, how.most)` int64, padded after their end.

    Args:
        stage: the whole model as one stage, in evaluation mode; gathered, where its weights are sharded.
        prompts: tokens, of any lengths.
        how: lengths and ids.
        chances: numbers between 0 and 1, `(prompts, how.most)` fp64: the token at which the summed probabilities pass
            one is taken. None: the likeliest token.
    """
    from transformers import DynamicCache

    device = next(stage.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    # Padded on the left: all go on at the same place.
    ids = torch.full((len(prompts), longest), how.pad_id)
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    answers = torch.full((len(prompts), how.most), how.pad_id, device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    cache: Any = DynamicCache()
    for place in range(how.most):
        logits = stage(ids, positions, attention_mask=mask, past_key_values=cache)
        ids = _next(logits, None if chances is None else chances[:, place], how.temperature)[:, None]
        answers[:, place] = torch.where(done, answers[:, place], ids[:, 0])
        done |= ids[:, 0] == how.eos_id
        if bool(done.all()):
            break
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return answers


def _next(logits: Tensor, chances: Tensor | None, temperature: float) -> Tensor:
    """A token a row of logits `(rows, vocabulary)`."""
    if chances is None:
        return logits.argmax(-1)
    sums = (logits.double() / temperature).softmax(-1).cumsum(-1)
    found = torch.searchsorted(sums, (chances.to(sums.device) * sums[:, -1])[:, None]).squeeze(1)
    return found.clamp(max=logits.shape[-1] - 1)


def lengths(answers: Tensor, eos_id: int) -> Tensor:
    """Tokens of each answer, its end included, `(rows,)`."""
    ended = answers == eos_id
    first = ended.to(torch.int64).argmax(1) + 1
    return torch.where(ended.any(1), first, answers.shape[1])


@contextmanager
def gathered(stage: nn.Module, pad_id: int, *, reshard: bool) -> Iterator[None]:
    """All weights here until the end, in evaluation mode, uncompiled; on all ranks together.

    Args:
        stage: as it is wrapped; no DistributedDataParallel.
        pad_id: any token.
        reshard: whether blocks let their gathered weights go after a forward pass otherwise.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [each for each in stage.modules() if isinstance(each, FSDPModule)]
    stage.eval()
    # A growing cache would have compiled blocks compile anew for every length.
    with torch.compiler.set_stance("force_eager"):
        try:
            for each in parts:
                each.set_reshard_after_forward(False, recurse=False)
            if parts:  # gathers each part when its turn comes, which is the same for all ranks; once
                device = next(stage.parameters()).device
                one = torch.full((1, 1), pad_id, device=device)
                with torch.no_grad():
                    stage(one, torch.zeros_like(one), torch.full_like(one, pad_id))
            yield
        finally:
            for each in parts:
                each.set_reshard_after_forward(reshard and each is not stage, recurse=False)
                each.reshard()
            stage.train()
