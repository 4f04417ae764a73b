"""A Llama-like decoder of transformers as stages: consecutive blocks, the embedding before, the loss after.

A stage runs transformers' own forward pass on a model from which the other blocks were taken out. What is
left keeps its name (`model.layers.7` stays `layers.7` in a stage that begins with it), so that a
checkpoint's names are the whole model's whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hpcdl.distributed.held import HeldLinear
from hpcdl.distributed.losses import IGNORE, linear_cross_entropy
from hpcdl.errors import HpcdlError

PLAIN_HEADS = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})
"""Model types whose logits are `hidden @ weight.T` and nothing more; others go through their own forward."""

WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names that wrappers put between a module and what it holds."""


def inner(model: Any) -> Any:
    """The transformers model inside peft's wrapper; itself where there is none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk(model: Any) -> Any:
    """The decoder without its head: what has `embed_tokens`, `layers` and `norm`."""
    return inner(model).base_model


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's blocks: the longest list of modules.

    Raises:
        HpcdlError: the model has none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise HpcdlError(
            f"{type(model).__name__} has no list of blocks to checkpoint, compile, shard or split"
        )
    return max(lists, key=len)


class SomeBlocks(nn.ModuleList):
    """Some of a decoder's blocks under the names that they have in the whole."""

    def __init__(self, kept: dict[int, nn.Module]) -> None:
        super().__init__()
        for number, block in kept.items():
            self.add_module(str(number), block)

    def __iter__(self) -> Iterator[nn.Module]:
        """The blocks in order."""
        return iter(self._modules.values())

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: Any) -> Any:
        """By place among those that are here, as transformers' forward pass slices them."""
        return list(self)[index]


class Stage(nn.Module):
    """Consecutive blocks of a causal language model: what strategies wrap; the whole model is one stage.

    The first embeds tokens, the last gives the summed loss; between them go hidden states.
    """

    def __init__(self, model: Any, *, is_first: bool = True, is_last: bool = True) -> None:
        super().__init__()
        self.model = model
        self.is_first = is_first
        self.is_last = is_last
        self.enter: Callable[[Tensor], Tensor] = _as_it_is
        """Makes of what another stage sent what the blocks take."""
        self.leave: Callable[[Tensor], Tensor] = _as_it_is
        """Makes of what the last block gave a tensor to send."""
        self.loss: Callable[[Tensor, Any, Tensor], Tensor] = linear_cross_entropy
        """Summed loss from hidden states, the head's weight (or its held matrix) and labels."""
        self.parking: AbstractContextManager[Any] = nullcontext()
        """Keeps what a pass saves for the backward pass elsewhere (hpcdl.distributed.parking)."""
        self.tied: str | None = None
        """Name of the trained embedding that is the head too, where one is here and the other isn't."""

    def forward(
        self, inputs: Tensor, position_ids: Tensor, labels: Tensor | None = None, **more: Any
    ) -> Tensor:
        """Hidden states `(batch, seq, width)`; of the last stage the summed cross-entropy, `(1,)` fp32.

        Where a cache is given (`past_key_values`), the whole model's logits of what comes next, `(batch, vocabulary)`.

        Args:
            inputs: tokens `(batch, seq)` for the first stage, else hidden states `(batch, seq, width)`.
            position_ids: `(batch, seq)`; begin anew with each document.
            labels: `(batch, seq)`, already shifted; only the last stage looks at them.
            more: passed on to every block's attention.
        """
        if "past_key_values" in more:
            out = self.model(
                input_ids=inputs, position_ids=position_ids, use_cache=True, logits_to_keep=1, **more
            )
            return out.logits[:, -1]  # type: ignore[no-any-return]
        with self.parking:
            return self._pass(inputs, position_ids, labels, more)

    def _pass(
        self, inputs: Tensor, position_ids: Tensor, labels: Tensor | None, more: dict[str, Any]
    ) -> Tensor:
        if self.is_first and self.is_last and not self.has_plain_head():
            return self._general(inputs, position_ids, labels, more)
        first = {"input_ids": inputs} if self.is_first else {"inputs_embeds": self.enter(inputs)}
        out = trunk(self.model)(**first, position_ids=position_ids, use_cache=False, **more)
        hidden: Tensor = out[0]
        if not self.is_last:
            return self.leave(hidden)
        assert labels is not None, "the last stage has the loss"
        # stacked: FSDP warns of a view, which reshape() gives
        head = self.head()
        matrix = head.matrix if isinstance(head, HeldLinear) else head.weight
        return torch.stack([self.loss(hidden, matrix, labels)])

    def _general(
        self, inputs: Tensor, position_ids: Tensor, labels: Tensor | None, more: dict[str, Any]
    ) -> Tensor:
        assert labels is not None
        logits = self.model(input_ids=inputs, position_ids=position_ids, use_cache=False, **more).logits
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        return torch.stack([loss])

    def head(self) -> Any:
        """The output head."""
        return inner(self.model).get_output_embeddings()

    def has_plain_head(self) -> bool:
        """Whether logits are the head's matrix times the hidden states and nothing more."""
        head = self.head()
        return (
            type(head) in (nn.Linear, HeldLinear)
            and getattr(head, "bias", None) is None
            and inner(self.model).config.model_type in PLAIN_HEADS
        )


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def cut(model: Any, first_block: int, last_block: int, *, is_first: bool, is_last: bool) -> Stage:
    """Turns the whole model into the stage of blocks `first_block … last_block - 1`, and frees the rest.

    A tied head becomes a weight of its own where its embedding is on another stage: their gradients are
    then to be added up (hpcdl.distributed.pipeline).
    """
    causal, base = inner(model), trunk(model)
    kept = {i: block for i, block in enumerate(base.layers) if first_block <= i < last_block}
    base.layers = SomeBlocks(kept)
    if getattr(base.config, "layer_types", None):  # transformers looks a block's up by its place in the list
        base.config.layer_types = base.config.layer_types[first_block:last_block]
    if not is_last:
        base.norm = nn.Identity()
        causal.lm_head = None
    elif isinstance(causal.lm_head, HeldLinear):
        pass  # frozen: each stage may have its own
    elif not is_first and causal.lm_head.weight is base.embed_tokens.weight:
        own = nn.Parameter(causal.lm_head.weight.detach().clone(), causal.lm_head.weight.requires_grad)
        causal.lm_head.weight = own
    if not is_first:
        base.embed_tokens = None
    return Stage(model, is_first=is_first, is_last=is_last)


def canonical(name: str) -> str:
    """A parameter's name in the whole model without wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by canonical name; tied ones once, under the first name."""
    return {canonical(name): parameter for name, parameter in module.named_parameters()}


def is_tied(model: Any) -> bool:
    """Whether the output head is the embedding's own weight."""
    causal = inner(model)
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    return embedding is not None and head is not None and embedding.weight is head.weight
