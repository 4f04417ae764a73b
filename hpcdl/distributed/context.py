"""Context parallel: each rank holds a chunk of every sequence; only attention looks beyond it.

A rank's block of tokens goes through embedding, norms, MLPs and the loss alone. Attention is replaced by a
function of ours, registered with transformers under a name of its own, that works on the whole sequence:

- `allgather`: every rank gathers the keys and values of all chunks, and attends with its own queries
  (Dubey et al., "The Llama 3 Herd of Models", 2024, section 3.3.2).
- `ulysses`: all-to-all swaps sequence for heads: a rank attends over the whole sequence with some of the
  heads, and swaps back (Jacobs et al., "DeepSpeed Ulysses", 2023).

Who sees whom is a mask, made once a forward pass from the positions of the whole sequence and given to the
model as its attention mask: transformers hands a mask of four dimensions on to every block as it is, also
when activations are recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from hpcdl.distributed.decoder import Stage, inner
from hpcdl.distributed.engine import Batch, Engine
from hpcdl.distributed.mesh import Grid
from hpcdl.errors import HpcdlError
from hpcdl.spec.model import MOVING_ROPE

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup

    from hpcdl.distributed.parallelize import Job

OTHER_ATTENTION = ("sliding_window", "softcap", "s_aux", "position_bias")
"""What transformers gives the attention of models that compute something else there."""


def share(config: Any, stage: Stage, grid: Grid) -> None:
    """Gives the model an attention that sees the other ranks' part of the sequence.

    Args:
        config: the strategy's MeshConfig.
        stage: its model's config is changed: the name of the attention, for this model only.
        grid: the degrees and this rank's place.

    Raises:
        HpcdlError: the model's attention is not plain causal attention.
    """
    from transformers import AttentionInterface

    group, settings = grid.group("cp"), inner(stage.model).config
    refuse_other_attention(settings)
    name = f"hpcdl_{config.cp_method}_{group.group_name}"
    AttentionInterface.register(name, partial(attend, group, swap=config.cp_method == "ulysses"))
    settings._attn_implementation = name


def refuse_other_attention(settings: Any) -> None:
    """Raises where the model's attention is not the plain causal one, or its positions are not its own."""
    kinds = set(getattr(settings, "layer_types", None) or ()) - {"full_attention"}
    if kinds or getattr(settings, "sliding_window", None) is not None:
        raise HpcdlError(
            f"parallel.cp: {settings.model_type} has attention that doesn't see the whole sequence "
            f"({', '.join(sorted(kinds)) or f'a window of {settings.sliding_window} tokens'}), "
            "and context parallel here is for causal attention alone; set parallel.cp=1"
        )
    scaling = (getattr(settings, "rope_parameters", None) or {}).get("rope_type")
    if scaling in MOVING_ROPE:
        raise HpcdlError(
            f"parallel.cp: the rotary scaling '{scaling}' depends on the longest position that a rank has, "
            "so ranks with other parts of the sequence would turn by other angles; set parallel.cp=1"
        )


class ContextEngine(Engine):
    """Cuts each micro-batch along the sequence; the ranks' sums of the loss make up the whole."""

    def __init__(self, config: Any, stages: Sequence[nn.Module], grid: Grid, job: Job) -> None:
        """As Engine.

        Args:
            config: the strategy's MeshConfig.
            stages: after `share`.
            grid: this rank's place.
            job: what the training asks for.
        """
        super().__init__(stages, grid, job.make_optimizer, autocast=job.autocast)
        self._method = config.cp_method

    def _forward(self, batch: Batch) -> Tensor:
        mine = cut_batch(self._method, self.grid, batch)
        return cast(Tensor, self.stages[0](mine.pop("input_ids"), **mine))


def cut_batch(method: str, grid: Grid, batch: Batch) -> Batch:
    """This rank's part of each sequence, and what its attention needs of the whole.

    Args:
        method: `allgather` or `ulysses`.
        grid: this rank's place.
        batch: whole sequences.

    Returns:
        What a Stage is given: each of `batch` as `(rows, seq_len / cp)`, and `attention_mask`, bool
        `(rows, 1, queries, seq_len)`. Ulysses attends with the queries of the whole sequence.
    """
    positions = batch["position_ids"]
    mine = chunk_of(positions.shape[1], grid.rank("cp"), grid.dims.cp)
    mask = visible(positions, slice(None) if method == "ulysses" else mine)
    return {**{name: whole[:, mine] for name, whole in batch.items()}, "attention_mask": mask}


def chunk_of(length: int, rank: int, ranks: int) -> slice:
    """A rank's part of a sequence."""
    size, rest = divmod(length, ranks)
    assert rest == 0, "the sequence divides by the ranks: checked before submission"
    return slice(rank * size, (rank + 1) * size)


def visible(position_ids: Tensor, queries: slice) -> Tensor:
    """Which keys of the whole sequence some queries see: those before them in their own document.

    A document begins wherever the position doesn't go on by 1, as transformers reads packed sequences;
    padding after a document goes on counting, and so belongs to it.

    Args:
        position_ids: `(batch, seq)` of the whole sequence.
        queries: which of its tokens ask.

    Returns:
        bool `(batch, 1, queries, seq)`.
    """
    begins = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
    document = begins.cumsum(1)
    place = torch.arange(position_ids.shape[1], device=position_ids.device)
    same = document[:, queries, None] == document[:, None, :]
    return (same & (place[queries, None] >= place)).unsqueeze(1)


def attend(
    group: ProcessGroup,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    swap: bool,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention of this rank's tokens over the whole sequence, as transformers calls it.

    Args:
        group: the ranks that share the sequence.
        module: the block's attention; not asked.
        query: `(batch, heads, chunk, width)`, this rank's tokens.
        key: `(batch, kv heads, chunk, width)`, before it is repeated for the heads that share it.
        value: as key; its width may be another.
        attention_mask: what `visible` gave.
        scaling: of the products; None: one over the root of the width.
        dropout: of the weights.
        swap: `ulysses`; else `allgather`.
        more: must not change what attention computes.

    Returns:
        `(batch, chunk, heads, width)`, and no weights.

    Raises:
        HpcdlError: the model wants more of its attention than a mask.
    """
    for name in OTHER_ATTENTION:
        if more.get(name) is not None:
            raise HpcdlError(f"parallel.cp: {type(module).__name__} asks for {name}; set parallel.cp=1")
    assert attention_mask is not None, "ContextEngine gives one"
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave fp32: half the traffic
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    inside = partial(_softmax, mask=attention_mask, scaling=scaling, dropout=dropout)
    out = (_swapped if swap else _gathered)(group, query, key, value, inside)
    return out.transpose(1, 2).contiguous(), None


def _gathered(group: ProcessGroup, query: Tensor, key: Tensor, value: Tensor, inside: Any) -> Tensor:
    both = torch.cat([key, value], dim=-1)
    chunks = _Gather.apply(both, group)  # type: ignore[no-untyped-call]
    whole = chunks.movedim(0, 2).flatten(2, 3)
    return cast(Tensor, inside(query, *whole.split([key.shape[-1], value.shape[-1]], dim=-1)))


def _swapped(group: ProcessGroup, query: Tensor, key: Tensor, value: Tensor, inside: Any) -> Tensor:
    ranks = group.size()
    # Each rank's heads need their keys: kv heads that the ranks can't be given evenly are sent repeatedly.
    repeats = math.lcm(key.shape[1], ranks) // key.shape[1]
    heads = [query, repeat(key, repeats), repeat(value, repeats)]
    theirs = _exchange([_split(x, 1, ranks) for x in heads], group)
    out = inside(*(x.movedim(0, 2).flatten(2, 3) for x in theirs))
    (mine,) = _exchange([_split(out, 2, ranks)], group)
    return mine.movedim(0, 1).flatten(1, 2)


def _softmax(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor, scaling: float | None, dropout: float
) -> Tensor:
    share_key = query.shape[1] // key.shape[1]
    # Repeated, not enable_gqa: with a mask, CUDA has no kernel for that but the one that keeps all weights.
    return scaled_dot_product_attention(
        query,
        repeat(key, share_key),
        repeat(value, share_key),
        attn_mask=mask,
        dropout_p=dropout,
        scale=scaling,
    )


def repeat(heads: Tensor, times: int) -> Tensor:
    """`(batch, heads, …)` → `(batch, heads * times, …)`, each head `times` in a row."""
    return heads if times == 1 else heads.repeat_interleave(times, dim=1)


def _split(tensor: Tensor, dim: int, ranks: int) -> Tensor:
    """Parts of a dimension, stacked: `(ranks, …)`."""
    return torch.stack(tensor.chunk(ranks, dim))


def _exchange(parts: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Row i of each `(ranks, …)` goes to rank i; row i of what comes is from rank i. One message for all."""
    rows = [part.flatten(1) for part in parts]
    sizes = [row.shape[1] for row in rows]
    came = _Swap.apply(torch.cat(rows, dim=1), group)  # type: ignore[no-untyped-call]
    return [row.reshape(part.shape) for row, part in zip(came.split(sizes, dim=1), parts, strict=True)]


class _Gather(torch.autograd.Function):
    """Everyone's tensor, stacked; the gradient of each part is the sum of everyone's."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        everyone = mine.new_empty((group.size() * mine.shape[0], *mine.shape[1:]))
        dist.all_gather_into_tensor(everyone, mine.contiguous(), group)
        return everyone.view(group.size(), *mine.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # added up in fp32, as attention on one device does
        sent = grad.flatten(0, 1).float().contiguous()
        total = sent.new_empty((sent.shape[0] // ctx.group.size(), *sent.shape[1:]))
        dist.reduce_scatter_tensor(total, sent, group=ctx.group)
        return total.to(grad.dtype), None


class _Swap(torch.autograd.Function):
    """All-to-all of the rows; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        came = torch.empty_like(rows)
        dist.all_to_all_single(came, rows.contiguous(), group=group)
        return came

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sent = grad.contiguous()
        back = torch.empty_like(sent)
        dist.all_to_all_single(back, sent, group=ctx.group)
        return back, None
