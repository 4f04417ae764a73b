"""What is exported: a folder of 16-bit (or 32-bit) weights as transformers has them, and its tokenizer's files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdl.errors import HpcdlError

if TYPE_CHECKING:
    from torch import Tensor

DECODERS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Classes of transformers that can be exported, and what llama.cpp calls them."""
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A whole model in a folder."""

    folder: Path
    """config.json and safetensors: nothing quantized, adapters merged."""
    tokenizer: Path
    """Folder with tokenizer.json and tokenizer_config.json."""
    name: str
    """As cards and metadata call it."""
    eos_id: int
    pad_id: int
    prefix: tuple[int, ...] = ()
    """Tokens before each text (beginning of text)."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json.

        Raises:
            HpcdlError: it can't be read, or is of a model that can't be exported.
        """
        try:
            found: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise HpcdlError(f"{self.folder / 'config.json'} can't be read: {error}") from error
        if "quantization_config" in found:
            raise HpcdlError(f"{self.folder} is quantized: export the 16-bit model that it was made from")
        given = found.get("architectures") or ["none named"]
        if given[0] not in DECODERS:
            raise HpcdlError(f"{given[0]} can't be exported; what can: {', '.join(DECODERS)}")
        if found.get("hidden_act", "silu") != "silu":
            raise HpcdlError(f"{self.folder}: hidden_act={found['hidden_act']} can't be exported, silu can")
        if found.get("mlp_bias"):
            raise HpcdlError(
                f"{self.folder}: mlp_bias=true can't be exported: no runtime here has such layers"
            )
        return found

    @property
    def decoder(self) -> str:
        """llama.cpp's name of the architecture."""
        return DECODERS[self.config["architectures"][0]]

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output head too."""
        return bool(self.config.get("tie_word_embeddings"))

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        own = self.config.get("head_dim")
        return int(own or self.config["hidden_size"] // self.config["num_attention_heads"])

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return int(self.config.get("num_key_value_heads") or self.config["num_attention_heads"])

    @property
    def rope(self) -> dict[str, Any]:
        """`rope_theta` and `rope_type`, with what the type needs; older configs have them elsewhere.

        Raises:
            HpcdlError: positions are scaled in a way that is not known here.
        """
        config = self.config
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
        rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        if rope["rope_type"] not in ("default", "linear", "llama3"):
            raise HpcdlError(
                f"positions that are scaled by rope_type={rope['rope_type']} can't be exported; what can: default,"
                " linear, llama3"
            )
        return rope

    @property
    def context(self) -> int:
        """Positions that it can look at; of a sliding window no more than its width."""
        most = int(self.config["max_position_embeddings"])
        window = self.config.get("sliding_window") if self.config.get("use_sliding_window", True) else None
        return min(most, int(window)) if window else most

    def pieces(self) -> dict[str, Any]:
        """Where each tensor lies (hpcdl.distributed.shards.Piece), a tied head left out.

        Raises:
            HpcdlError: weights are missing, or a file is torn.
        """
        from hpcdl.distributed import shards

        found = dict(shards.pieces(self.folder))
        if self.tied:
            found.pop(HEAD, None)
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and fp32 tensors, one in memory at a time."""
        for name, piece in self.pieces().items():
            yield name, piece.read().float()

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json with the chat template in it, wherever it lay; empty where there is none."""
        found = read_json(self.tokenizer / "tokenizer_config.json")
        template = self.tokenizer / "chat_template.jinja"
        if template.is_file():
            found["chat_template"] = template.read_text(encoding="utf-8")
        return found

    def inverse_frequencies(self) -> tuple[list[float], list[float]]:
        """`(head_dim / 2,)` each: RoPE's inverse frequencies, and what llama.cpp divides the plain ones by.

        llama3: "Llama 3.1" as transformers' modeling_rope_utils has it.
        """
        import math

        rope, half = self.rope, self.head_dim // 2
        plain = [rope["rope_theta"] ** (-i / half) for i in range(half)]
        if rope["rope_type"] == "linear":
            return [each / rope["factor"] for each in plain], [rope["factor"]] * half
        if rope["rope_type"] == "default":
            return plain, [1.0] * half
        old = rope["original_max_position_embeddings"]
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        divisors = []
        for each in plain:
            length = 2 * math.pi / each
            if length < old / high:
                divisors.append(1.0)
            elif length > old / low:
                divisors.append(factor)
            else:
                smooth = (old / length - low) / (high - low)
                divisors.append(1 / ((1 - smooth) / factor + smooth))
        return [each / by for each, by in zip(plain, divisors, strict=True)], divisors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise HpcdlError(f"{path} is no JSON: {error}") from error
    return found if isinstance(found, dict) else {}
