"""A decoder for torch.export: keys and values of earlier tokens are buffers of its own.

Written in operations that ExecuTorch's portable kernels and XNNPACK have; no batch axis but the one of the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpcdl.export.source import EMBEDDING, HEAD, Source

LEVELS = 127
"""Of 8 bits to each side of zero."""


class Table(nn.Module):
    """The embedding: in fp32, or in 8 bits with a scale a row."""

    rows: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, *, in_bits: bool) -> None:
        super().__init__()
        self.in_bits = in_bits
        if in_bits:
            scales = (weight.abs().amax(dim=1) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
            self.register_buffer("rows", (weight / scales[:, None]).round().to(torch.int8))
            self.register_buffer("scales", scales)
        else:
            self.register_buffer("rows", weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(1, tokens)` → `(1, tokens, width)`."""
        rows: Tensor = self.rows[tokens]
        return rows.float() * self.scales[tokens][..., None] if self.in_bits else rows


class Norm(nn.Module):
    """Root mean square norm over the last axis."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, given: Tensor) -> Tensor:
        """Of any shape that ends in the weight's."""
        return given * torch.rsqrt((given * given).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """Grouped queries over all that the buffers hold."""

    keys: Tensor
    values: Tensor
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, source: Source, heads: int, context: int) -> None:
        super().__init__()
        self.heads, self.shared, self.width = heads, source.kv_heads, source.head_dim
        shape = (context, self.shared, self.width)
        self.register_buffer("keys", torch.zeros(shape), persistent=False)
        self.register_buffer("values", torch.zeros(shape), persistent=False)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None

    def turned(self, given: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """`(tokens, heads, head_dim)` at their positions."""
        cosine, sine = turn
        half = self.width // 2
        return given * cosine + torch.cat([-given[..., half:], given[..., :half]], dim=-1) * sine

    def forward(
        self, normed: Tensor, places: Tensor, turn: tuple[Tensor, Tensor], bias: Tensor, there: Tensor
    ) -> Tensor:
        """`normed` is `(1, tokens, hidden)`."""
        count, each = normed.shape[1], self.heads // self.shared
        query = self.q_proj(normed).view(count, self.heads, self.width)
        key = self.k_proj(normed).view(count, self.shared, self.width)
        value = self.v_proj(normed).view(count, self.shared, self.width)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        self.keys.index_copy_(0, places, self.turned(key, turn))
        self.values.index_copy_(0, places, value)
        # what was never written may be anything, and 0 · nan is nan
        keys = torch.where(there, self.keys, 0.0).permute(1, 2, 0)
        values = torch.where(there, self.values, 0.0).permute(1, 0, 2)
        grouped = self.turned(query, turn).view(count, self.shared, each, self.width)
        grouped = grouped.permute(1, 0, 2, 3).flatten(1, 2)
        scores = (torch.bmm(grouped, keys) * self.width**-0.5).view(self.shared, count, each, -1) + bias
        seen = torch.bmm(torch.softmax(scores, dim=-1).flatten(1, 2), values)
        flat = seen.view(self.shared, count, each, self.width).permute(1, 0, 2, 3).flatten(1)
        out: Tensor = self.o_proj(flat.unsqueeze(0))
        return out


class Gated(nn.Module):
    """Shazeer, "GLU Variants Improve Transformer", 2020."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, normed: Tensor) -> Tensor:
        """`(1, tokens, hidden)`, as given."""
        out: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return out


class Block(nn.Module):
    """Attention, then the gated network."""

    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = Gated()

    def forward(
        self, hidden: Tensor, places: Tensor, turn: tuple[Tensor, Tensor], bias: Tensor, there: Tensor
    ) -> Tensor:
        """`hidden` is `(1, tokens, hidden)`."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), places, turn, bias, there)
        normed = self.post_attention_layernorm(hidden)
        out: Tensor = hidden + self.mlp(normed)
        return out


class Decoder(nn.Module):
    """The source's decoder; modules are named as transformers names them."""

    frequencies: Tensor
    slots: Tensor

    def __init__(self, source: Source, context: int, *, in_bits: bool) -> None:
        """Reads the weights.

        Args:
            source: what is exported.
            context: tokens that the buffers hold.
            in_bits: whether the embedding is int8.
        """
        super().__init__()
        config, pieces = source.config, source.pieces()

        def read(name: str) -> Tensor:
            found: Tensor = pieces[name].read().float()
            return found

        def linear(name: str) -> nn.Linear:
            weight = read(f"{name}.weight")
            with torch.device("meta"):
                made = nn.Linear(weight.shape[1], weight.shape[0], bias=f"{name}.bias" in pieces)
            made.weight = nn.Parameter(weight, requires_grad=False)
            if made.bias is not None:
                made.bias = nn.Parameter(read(f"{name}.bias"), requires_grad=False)
            return made

        eps = float(config["rms_norm_eps"])
        self.embed_tokens = Table(read(EMBEDDING), in_bits=in_bits)
        self.layers = nn.ModuleList()
        for layer in range(int(config["num_hidden_layers"])):
            at = f"model.layers.{layer}"
            attention = Attention(source, int(config["num_attention_heads"]), context)
            block = Block(attention)
            for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(attention, part, linear(f"{at}.self_attn.{part}"))
            for part in ("q_norm", "k_norm"):
                if f"{at}.self_attn.{part}.weight" in pieces:
                    setattr(attention, part, Norm(read(f"{at}.self_attn.{part}.weight"), eps))
            for part in ("gate_proj", "up_proj", "down_proj"):
                setattr(block.mlp, part, linear(f"{at}.mlp.{part}"))
            for part in ("input_layernorm", "post_attention_layernorm"):
                setattr(block, part, Norm(read(f"{at}.{part}.weight"), eps))
            self.layers.append(block)
        self.norm = Norm(read("model.norm.weight"), eps)
        self.lm_head = nn.Linear(1, 1, bias=False) if source.tied else linear(HEAD.removesuffix(".weight"))
        if source.tied:
            self.lm_head.weight = nn.Parameter(read(EMBEDDING), requires_grad=False)
        frequencies = torch.tensor(source.inverse_frequencies()[0])
        self.register_buffer("frequencies", torch.cat([frequencies, frequencies]), persistent=False)
        self.register_buffer("slots", torch.arange(context), persistent=False)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Logits `(1, tokens, vocabulary)` of `tokens` `(1, tokens)` at the positions `places` `(tokens,)`."""
        hidden = self.embed_tokens(tokens)
        angles = places[:, None].float() * self.frequencies
        turn = (angles.cos()[:, None], angles.sin()[:, None])
        allowed = self.slots[None] <= places[:, None]
        bias = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]
        there = (self.slots <= places[-1])[:, None, None]
        for layer in self.layers:
            hidden = layer(hidden, places, turn, bias, there)
        out: Tensor = self.lm_head(self.norm(hidden))
        return out
