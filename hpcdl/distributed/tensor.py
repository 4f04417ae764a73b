"""Tensor parallel on the torch side: every matrix in parts, and the collectives around them.

Weights are DTensors on the mesh's `tp` dimension, the residual stream between blocks is one too: split
along the sequence (sequence parallel) or whole on every rank. Inside the attention and the MLP everything
is plain local tensors, and the gradient of their input a partial sum: one all-gather at the entry, one
reduce-scatter at the exit, and the same in the backward pass (Korthikanti et al., 2023, figure 5).

    residual ──norm──▶ stream ──enter──▶ whole sequence ─Column─▶ own heads ─Row─▶ stream ──▶ residual

Source: Shoeybi et al., "Megatron-LM", 2019, section 3.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from hpcdl.distributed.decoder import PLAIN_HEADS, Stage, inner, trunk
from hpcdl.distributed.losses import Part, linear_cross_entropy
from hpcdl.distributed.mesh import Grid
from hpcdl.distributed.zeros import KeepsZeros, keep_zeros
from hpcdl.errors import HpcdlError

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Matrices of which each rank has some outputs: heads, and neurons of the MLP."""

ROWS = ("o_proj", "down_proj")
"""Matrices of which each rank has the inputs that it made itself."""

HEAD_NORMS = ("q_norm", "k_norm")
"""Norms over one head's width, of the heads that are here (Qwen3)."""

SEQUENCE, HEADS = 1, 2
"""Dimensions of `(batch, seq, width)` and of `(batch, seq, heads, head_dim)`."""


def shard(config: Any, stage: Stage, grid: Grid) -> None:
    """Leaves this rank's part of a stage, in place.

    Args:
        config: the strategy's MeshConfig.
        stage: whole blocks, the same on every rank of a tensor parallel group.
        grid: the degrees and this rank's place.

    Raises:
        HpcdlError: the model isn't built like a Llama, or its head isn't a plain matrix.
    """
    refuse(stage, grid.dims.tp)
    mesh = grid.weights["tp"]
    stream: Placement = Shard(SEQUENCE) if config.sequence_parallel else Replicate()
    base, head = trunk(stage.model), stage.head()
    place = Placer(mesh, stream, grid.device)
    if base.embed_tokens is not None:
        place.matrix(base.embed_tokens, VocabularyEmbedding, Shard(0))
    if stage.is_last:
        place.matrix(head, nn.Linear, Shard(0))  # the very parameter of a tied embedding
        place.copies(base.norm)
        stage.loss = split_vocabulary if config.loss_parallel else whole_vocabulary
    for block in base.layers:
        _shard_block(block, place)
    place.nothing_left(stage)
    if not stage.is_first:
        stage.enter = partial(_from_before, mesh, stream)
    if not stage.is_last:
        stage.leave = _to_next


def refuse(stage: Stage, ranks: int) -> None:
    """Models whose matrices or head are not where a Llama's are, and heads that can't be shared out.

    Raises:
        HpcdlError: says which, and what works instead.
    """
    config = inner(stage.model).config
    if config.model_type not in PLAIN_HEADS or (stage.is_last and not stage.has_plain_head()):
        raise HpcdlError(
            f"parallel.tp={ranks}: a {config.model_type} with this head can't be split, only the plain heads of"
            f" {', '.join(sorted(PLAIN_HEADS))}; parallel=fsdp shards any model"
        )
    # Of models from a hub or a folder the sizes may not have been known before.
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % ranks:
            raise HpcdlError(
                f"parallel.tp={ranks} does not divide the model's {name} {getattr(config, name)}"
            )


def _shard_block(block: Any, place: Placer) -> None:
    for part in (block.self_attn, block.mlp):
        part.register_forward_pre_hook(_gather_input, with_kwargs=True)
        for name, module in part.named_children():
            if name in COLUMNS:
                place.columns(module)
            elif name in ROWS:
                place.rows(module)
            elif name in HEAD_NORMS:
                place.copies(module)
                module.register_forward_pre_hook(partial(_heads_in, place.mesh))
                module.register_forward_hook(_heads_out)
    for name, module in block.named_children():
        if name.endswith("layernorm"):
            place.copies(module)


# --- parameters -------------------------------------------------------------------------------------------


class Placer:
    """Puts parameters on the mesh; one that is used in two places stays one."""

    def __init__(self, mesh: DeviceMesh, stream: Placement, device: torch.device) -> None:
        self.mesh = mesh
        self.stream = stream
        self.device = device
        self._placed: dict[nn.Parameter, nn.Parameter] = {}

    def columns(self, module: nn.Module) -> None:
        """A matrix of which each rank has some outputs: B·A of LoRA is split in B."""
        matrix, lora_a, lora_b = lora_parts(module)
        for split in (matrix, *lora_b):
            self.matrix(split, Column, Shard(0), Shard(0))
        for whole in lora_a:
            self.matrix(whole, WholeIn, Replicate(), Replicate())

    def rows(self, module: nn.Module) -> None:
        """A matrix of which each rank has some inputs: B·A of LoRA is split in A."""
        matrix, lora_a, lora_b = lora_parts(module)
        for split in (matrix, *lora_a):
            self.matrix(split, Row, Shard(1), Replicate())
        for whole in lora_b:
            self.matrix(whole, OnStream, Replicate(), Replicate())

    def matrix(
        self, module: nn.Module, kind: type[nn.Module], weight: Placement, bias: Placement | None = None
    ) -> None:
        """Places the weight (and bias) and has the module compute as `kind` does."""
        if type(module) not in (nn.Linear, nn.Embedding, KeepsZeros):
            raise HpcdlError(
                f"parallel.tp={self.mesh.size()} can't split a {type(module).__module__}.{type(module).__name__}:"
                " it takes plain matrices and LoRA's; parallel=fsdp shards others"
            )
        for name, parameter in list(module.named_parameters(recurse=False)):
            self._place(module, name, parameter, weight if name == "weight" else cast(Placement, bias))
        keeps_zeros = type(module) is KeepsZeros
        module.__class__ = kind
        module.keeps_zeros = keeps_zeros  # type: ignore[assignment]
        module.mesh, module.stream = self.mesh, self.stream  # type: ignore[assignment]

    def copies(self, module: nn.Module) -> None:
        """Every rank keeps the module's parameters whole."""
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                self._place(owner, name, parameter, Replicate())

    def nothing_left(self, stage: Stage) -> None:
        """Clipping and the optimizer take parameters of one mesh only.

        Raises:
            HpcdlError: the model has a parameter that isn't a Llama's.
        """
        for name, parameter in stage.named_parameters():
            if not isinstance(parameter, DTensor):
                raise HpcdlError(
                    f"parallel.tp={self.mesh.size()}: no rule how to split {name}; parallel=fsdp shards any model"
                )

    def _place(self, module: nn.Module, name: str, parameter: nn.Parameter, placement: Placement) -> None:
        if parameter not in self._placed:
            # Every rank has loaded the same weights: nothing is sent. A part is copied out of the whole, which
            # would stay in memory as long as a view of it.
            part = distribute_tensor(parameter.detach(), self.mesh, [placement], src_data_rank=None)
            own = DTensor.from_local(
                part.to_local().to(self.device, copy=True), self.mesh, [placement],
                run_check=False, shape=part.shape, stride=part.stride(),
            )  # fmt: skip
            self._placed[parameter] = nn.Parameter(own, parameter.requires_grad)
        module.register_parameter(name, self._placed[parameter])


def lora_parts(module: Any) -> tuple[nn.Module, list[nn.Module], list[nn.Module]]:
    """The frozen matrix, A and B of peft's layer; a plain layer has neither A nor B."""
    if not hasattr(module, "base_layer"):
        return module, [], []
    return module.base_layer, list(module.lora_A.values()), list(module.lora_B.values())


# --- how they compute -------------------------------------------------------------------------------------


class Column(nn.Linear):
    """Some outputs: the whole sequence `(batch, seq, width)` → this rank's columns, plain tensors."""

    def forward(self, input: Tensor) -> Tensor:
        """The gradient of the input is this rank's summand of the whole one."""
        bias = None if self.bias is None else _local(self.bias)
        return nn.functional.linear(input, _used(self), bias)


class WholeIn(nn.Linear):
    """LoRA's A before a split B: whole on every rank, which sees some of the gradient only."""

    def forward(self, input: Tensor) -> Tensor:
        """`(batch, seq, width)` → `(batch, seq, rank)`, plain tensors, the same on every rank."""
        return nn.functional.linear(input, _local(self.weight, Partial()))


class Row(nn.Linear):
    """Some inputs: this rank's columns → the stream, in which the ranks' summands are added up."""

    mesh: DeviceMesh
    stream: Placement

    def forward(self, input: Tensor) -> DTensor:
        """`(batch, seq, width / tp)` plain → `(batch, seq, width)` on the stream."""
        summand = nn.functional.linear(input, _used(self))
        out = DTensor.from_local(summand, self.mesh, [Partial()], run_check=False)
        out = out.redistribute(placements=[self.stream])
        return out if self.bias is None else cast(DTensor, out + self.bias)


class OnStream(nn.Linear):
    """LoRA's B after a split A: whole on every rank, on the stream."""

    mesh: DeviceMesh
    stream: Placement

    def forward(self, input: DTensor) -> DTensor:  # type: ignore[override]
        """`(batch, seq, rank)` → `(batch, seq, width)`; locally, since DTensor can't flatten a split sequence."""
        grad = Partial() if self.stream.is_shard() else Replicate()
        out = nn.functional.linear(input.to_local(), _local(self.weight, grad))
        return DTensor.from_local(out, self.mesh, [self.stream], run_check=False)


class VocabularyEmbedding(nn.Embedding):
    """Some rows of the embedding: tokens `(batch, seq)` → the stream."""

    mesh: DeviceMesh
    stream: Placement

    def forward(self, input: Tensor) -> DTensor:
        """Zeros for tokens whose row another rank has; then the sum over the ranks."""
        rows = _local(self.weight)
        first, _ = rows_here(self.num_embeddings, self.mesh)
        inside = (input >= first) & (input < first + rows.shape[0])
        padding = None if self.padding_idx is None else self.padding_idx - first
        if padding is not None and not 0 <= padding < rows.shape[0]:
            padding = None
        found = nn.functional.embedding((input - first).where(inside, 0), rows, padding)
        summand = found * inside.unsqueeze(-1)
        out = DTensor.from_local(summand, self.mesh, [Partial()], run_check=False)
        return out.redistribute(placements=[self.stream])


def _local(parameter: Tensor, grad: Placement | None = None) -> Tensor:
    """This rank's part; `grad` says what its gradient here is, where that isn't the parameter's own placement."""
    return cast(DTensor, parameter).to_local(grad_placements=None if grad is None else [grad])


def _used(module: nn.Module) -> Tensor:
    """This rank's part of a split weight; a pruned one's zeros get no gradient."""
    weight = _local(cast(Tensor, module.weight))
    return keep_zeros(weight) if module.keeps_zeros else weight


# --- the stream's edges -----------------------------------------------------------------------------------


def gathered(stream: DTensor) -> Tensor:
    """The whole sequence as a plain tensor, whose gradient is summed over the ranks on its way back."""
    if torch.is_autocast_enabled(stream.device.type):  # what the matrices take: half as much to send
        stream = cast(DTensor, stream.to(torch.get_autocast_dtype(stream.device.type)))
    return stream.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def _gather_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Attention and MLP: the hidden states are the first argument, or go by name."""
    if args:
        return (gathered(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": gathered(kwargs["hidden_states"])}


def _heads_in(mesh: DeviceMesh, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (DTensor.from_local(args[0], mesh, [Shard(HEADS)], run_check=False), *args[1:])


def _heads_out(_: nn.Module, __: tuple[DTensor, ...], out: DTensor) -> Tensor:
    return out.to_local()


def _from_before(mesh: DeviceMesh, stream: Placement, hidden: Tensor) -> Tensor:
    """What another stage sent `(batch, seq / tp, width)` → the stream."""
    return DTensor.from_local(hidden, mesh, [stream], run_check=False)


def _to_next(hidden: Tensor) -> Tensor:
    """The stream → what is sent; no view, since zero-bubble schedules detach it in place."""
    return cast(DTensor, hidden).to_local().clone()


# --- the loss ---------------------------------------------------------------------------------------------


def split_vocabulary(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy, each rank with its rows of the head (loss parallel).

    Args:
        hidden: `(batch, seq, width)` on the stream.
        weight: `(vocabulary, width)`, its rows split.
        labels: `(batch, seq)`, already shifted, the same on every rank.
    """
    head = cast(DTensor, weight)
    part = Part(head.device_mesh.get_group(), *rows_here(head.shape[0], head.device_mesh))
    return linear_cross_entropy(gathered(cast(DTensor, hidden)), head.to_local(), labels, part)


def whole_vocabulary(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same with the head gathered, and the loss taken by every rank alike."""
    states, head = (cast(DTensor, each).redistribute(placements=[Replicate()]) for each in (hidden, weight))
    return linear_cross_entropy(states.to_local(), head.to_local(), labels)


def rows_here(rows: int, mesh: DeviceMesh) -> tuple[int, int]:
    """First row that this rank has, and the most rows that any has: DTensor gives the first ranks more."""
    most = -(-rows // mesh.size())
    return min(mesh.get_local_rank() * most, rows), most
