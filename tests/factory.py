"""Plain experiments for tests: a tiny Llama on synthetic text, changed by dotted keys."""

from __future__ import annotations

import copy
from typing import Any

from hpcdl.runs.spec import spec_of
from hpcdl.spec import ExperimentSpec

TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 0,
    "model": {
        "name": "llama_tiny",
        "tokenizer": "byte",
        "shape": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 260,
            "max_position_embeddings": 128,
        },
    },
    "data": {"kind": "synthetic", "seq_len": 32, "num_samples": 256},
    "parallel": {"name": "ddp"},
    "peft": {"name": "none"},
    "quant": {"scheme": "none"},
    "prune": {"name": "none"},
    "offload": {"name": "none"},
    "task": {"name": "pretrain", "sample_prompt": ""},
    "optim": {"lr": 0.01},
    "trainer": {"max_steps": 6, "global_batch_size": 8, "micro_batch_size": 2},
    "cluster": {"kind": "local"},
    "tracker": {"name": "none"},
    "monitor": {"name": "none"},
    "preflight": {"name": "default"},
}


def tiny_plain(**dotted: Any) -> dict[str, Any]:
    """The tiny experiment as a plain dict; keys are dotted paths with `__` for the dot."""
    plain = copy.deepcopy(TINY)
    for key, value in dotted.items():
        *parents, leaf = key.split("__")
        node = plain
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return plain


def tiny_spec(**dotted: Any) -> ExperimentSpec:
    """The tiny experiment as the compute nodes see it."""
    return spec_of(tiny_plain(**dotted))
