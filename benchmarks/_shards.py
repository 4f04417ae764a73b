"""Checkpoints of a Llama's shape with random bf16 weights, written tensor by tensor: a few dozen MB of memory.

The files are those of transformers' `save_pretrained`: shards of at most 5 GB, an index, config.json. safetensors
is simple enough to be written as a stream: the length of a header in 8 bytes, the header as JSON (dtype, shape and
place of each tensor), the bytes. Its own `save_file` would want a whole shard in memory.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

CHUNK = 4 * 2**20
"""Weights that are drawn at a time: 16 MiB in fp32."""
STD = 0.02
"""Of random matrices, as Llama's own are initialised; norms are 1. Losses are then finite, near ln(vocabulary)."""
SHARD_BYTES = 5 * 10**9
"""As transformers cuts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama's dimensions, by their names in config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: dict[str, float | int | str] | None = None
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


LLAMA31_ROPE: dict[str, float | int | str] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = {
    "llama3_8b": Shape(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0,
        rope_scaling=LLAMA31_ROPE,
    ),
    "llama3_8b_tied": Shape(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0,
        rope_scaling=LLAMA31_ROPE, tie_word_embeddings=True,
    ),
    "llama2_7b": Shape(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096, rope_theta=10000.0,
    ),
    "llama3_1b": Shape(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0,
        rope_scaling={**LLAMA31_ROPE, "factor": 32.0}, tie_word_embeddings=True,
    ),
    "small": Shape(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=1024, max_position_embeddings=1024, rope_theta=10000.0,
    ),
}  # fmt: skip
"""Published shapes (config.json of meta-llama/Llama-3.1-8B, Llama-2-7b-hf, Llama-3.2-1B), the first with a tied
head as well (as no published model has it), and one of seconds for trying the benchmark itself."""

Tensors = list[tuple[str, tuple[int, ...]]]


def tensors(shape: Shape) -> Tensors:
    """Every tensor's name and shape, in the order of the files."""
    width, inner, head = shape.hidden_size, shape.intermediate_size, shape.head_dim
    queries, keys = shape.num_attention_heads * head, shape.num_key_value_heads * head
    found: Tensors = [("model.embed_tokens.weight", (shape.vocab_size, width))]
    for layer in range(shape.num_hidden_layers):
        parts = {
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        found += [(f"model.layers.{layer}.{name}.weight", size) for name, size in parts.items()]
    found.append(("model.norm.weight", (width,)))
    if not shape.tie_word_embeddings:
        found.append(("lm_head.weight", (shape.vocab_size, width)))
    return found


def parameters(shape: Shape) -> int:
    """Numbers in the model, a tied head once."""
    return sum(math.prod(size) for _, size in tensors(shape))


def make(folder: Path, shape: Shape, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the checkpoint, unless this very one is there; config.json comes last, and says that it is whole.

    Raises:
        SystemExit: the disk has not enough room; nothing is written.
    """
    config = config_of(shape)
    file = folder / "config.json"
    if file.exists():
        if json.loads(file.read_text()) != config:
            raise SystemExit(f"{folder} holds another model: --folder another")
        print(f"{folder}: there already", file=sys.stderr)
        return
    need = 2 * parameters(shape)
    folder.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(folder).free
    print(f"{folder}: {need / 1e9:.1f} GB of disk for the weights, {room / 1e9:.1f} GB free", file=sys.stderr)
    if room < need + 2**30:
        raise SystemExit(
            f"{folder}: the weights need {need / 1e9:.1f} GB of disk and a little over, {room / 1e9:.1f} GB are free:"
            " --folder on another disk, or fewer --layers"
        )
    shards = list(in_shards(tensors(shape), shard_bytes))
    index: dict[str, str] = {}
    for number, part in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write(folder / name, part)
        index |= {tensor: name for tensor, _ in part}
    said = {"metadata": {"total_size": need}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(said, indent=1))
    file.write_text(json.dumps(config, indent=1))


def config_of(shape: Shape) -> dict[str, Any]:
    """config.json as transformers reads it."""
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta, **(shape.rope_scaling or {})}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_parameters": rope,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tie_word_embeddings,
        # the byte tokenizer's, which every one of these vocabularies is large enough for
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "dtype": "bfloat16",
    }


def in_shards(every: Tensors, limit: int) -> Iterator[Tensors]:
    """Consecutive tensors of at most `limit` bytes together."""
    part: Tensors = []
    size = 0
    for name, shape in every:
        mine = 2 * math.prod(shape)
        if part and size + mine > limit:
            yield part
            part, size = [], 0
        part.append((name, shape))
        size += mine
    yield part


def write(path: Path, part: Tensors) -> None:
    """One shard; under another name until it is whole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in part:
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    half = path.with_suffix(".part")
    with half.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in part:
            draw(file, name, shape)
    half.rename(path)
    print(f"  {path.name}: {at / 1e9:.2f} GB", file=sys.stderr)


def draw(file: BinaryIO, name: str, shape: tuple[int, ...]) -> None:
    """The bytes of one tensor: normal numbers seeded by its name, or ones for a norm."""
    import torch

    left = math.prod(shape)
    numbers = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    while left:
        count = min(left, CHUNK)
        drawn = torch.ones(count) if len(shape) == 1 else torch.randn(count, generator=numbers).mul_(STD)
        file.write(drawn.bfloat16().view(torch.uint8).numpy().data)
        left -= count
