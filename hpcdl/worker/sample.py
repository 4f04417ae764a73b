"""A few words that the model writes, for the result card: greedy, so that before and after can be compared."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from hpcdl.spec import TaskSpec
from hpcdl.worker import tasks
from hpcdl.worker.network import Network
from hpcdl.worker.tokenizer import Tokenizer


def has_adapter(model: Any) -> bool:
    """Whether the model as it was before training is still there, under an adapter that can be turned off."""
    return hasattr(model, "disable_adapter")


def write(net: Network, tokenizer: Tokenizer, task: TaskSpec, *, adapter: bool = True) -> str:
    """How the model goes on from the task's prompt; leaves the model in training mode and RNG untouched.

    Args:
        net: the network.
        tokenizer: its tokenizer.
        task: the prompt and how many tokens to write.
        adapter: False: with the adapter turned off, the model as it was before training.
    """
    if not task.sample_prompt or not task.sample_tokens:
        return ""
    prompt = tasks.get(task.name).prompt(task.sample_prompt, tokenizer)
    model = net.model
    ids = torch.tensor([prompt], device=net.takes_tokens_on())
    model.eval()
    # A growing cache would have compiled blocks compile anew for every length.
    eager = torch.compiler.set_stance("force_eager")
    with torch.no_grad(), net.context(), eager, nullcontext() if adapter else model.disable_adapter():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=task.sample_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
        )
    model.train()
    return tokenizer.decode(out[0, len(prompt) :].tolist())
