"""safetensors: a folder that transformers, vLLM and others read; weights in 16 or 32 bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdl.export import Bound
from hpcdl.export.source import Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SUMMARY = "a folder for transformers, vLLM and others"
FILE = "model.safetensors"
RUNTIME = "torch"
NEEDS = ("transformers",)
QUANTS = {
    "bf16": Bound(perplexity=1.01, logits=0.05, weights=4e-3),
    "f16": Bound(perplexity=1.005, logits=0.02, weights=1e-3),
    "f32": Bound(perplexity=1.001, logits=1e-3, weights=1e-6),
}
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def write(source: Source, quant: str, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """One file of weights, config.json and the tokenizer's files."""
    import torch
    from safetensors.torch import save_file

    dtype = getattr(torch, DTYPES[quant])
    save_file({name: tensor.to(dtype) for name, tensor in source.tensors()}, folder / FILE, {"format": "pt"})
    config = {**source.config, "dtype": DTYPES[quant]}
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    copy_tokenizer(source, folder)
    if (source.folder / "generation_config.json").is_file():
        shutil.copyfile(source.folder / "generation_config.json", folder / "generation_config.json")
    return {}


def weights(source: Source, folder: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """As they lie in the file."""
    from hpcdl.distributed import shards

    for name, piece in shards.pieces(folder).items():
        yield name, piece.read().float().numpy()


def copy_tokenizer(source: Source, folder: Path) -> None:
    """The tokenizer's files, and what hpcdl's runtimes ask of it, into an export's folder."""
    for path in source.tokenizer.iterdir():
        if path.is_file() and (path.name.startswith(("tokenizer", "special_tokens", "chat_template"))):
            shutil.copyfile(path, folder / path.name)
    words = {
        "eos": source.eos_id, "pad": source.pad_id, "prefix": source.prefix,
        "context": source.context, "template": source.tokenizer_config.get("chat_template"),
    }  # fmt: skip
    (folder / WORDS).write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")


WORDS = "vocabulary.json"
"""Beside formats that don't carry a vocabulary: special ids and the chat template."""
