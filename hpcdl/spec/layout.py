"""What a Llama-like decoder is made of, by name and size: what every method says its bytes of.

Arithmetic only: the login node plans with it what the compute nodes will hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hpcdl.spec.model import ModelShape

Role = Literal["block", "norm", "embedding", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One weight of the model, and how many there are like it."""

    name: str
    """As transformers calls its module: `q_proj`, `embed_tokens`, …"""
    role: Role
    """A block's matrix, a norm's vector, the embedding, or the output head."""
    rows: int
    """Outputs; of the embedding and the head the vocabulary."""
    columns: int
    """Inputs; 1 for a vector."""
    count: int
    """How many of it the whole model has."""

    @property
    def numel(self) -> int:
        """Numbers in one of them."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The bytes of one matrix as a quantization scheme holds it."""

    bytes: float
    """Kept: numbers, and their scales."""
    whole: float = 0.0
    """On top while the matrix is used: made whole, with what that takes; 0 where it is used as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What a fine-tuning method puts beside one matrix."""

    parameters: int = 0
    """Trained numbers."""
    kept: int = 0
    """Numbers a token that are kept for the backward pass, the matrix's input left out."""
    rank: int = 0
    """Of the low-rank way beside it; 0: there is none."""
    lengths: bool = False
    """Whether its rows have trained lengths."""
    dropped: bool = False
    """Whether its input goes through dropout first."""


def head_dim(shape: ModelShape) -> int:
    """Width of an attention head."""
    return shape.head_dim or shape.hidden_size // shape.num_attention_heads


def matrices(shape: ModelShape) -> Iterator[Matrix]:
    """Every weight of the model; a tied head is the embedding and doesn't come again."""
    width, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    queries, keys = (
        shape.num_attention_heads * head_dim(shape),
        shape.num_key_value_heads * head_dim(shape),
    )
    yield Matrix(name="embed_tokens", role="embedding", rows=shape.vocab_size, columns=width, count=1)
    sizes = {
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }
    for name, (rows, columns) in sizes.items():
        yield Matrix(name=name, role="block", rows=rows, columns=columns, count=layers)
    yield Matrix(name="norm", role="norm", rows=width, columns=1, count=2 * layers + 1)
    if not shape.tie_word_embeddings:
        yield Matrix(name="lm_head", role="head", rows=shape.vocab_size, columns=width, count=1)


def parameters(shape: ModelShape) -> int:
    """Numbers in the whole model."""
    return sum(matrix.numel * matrix.count for matrix in matrices(shape))
