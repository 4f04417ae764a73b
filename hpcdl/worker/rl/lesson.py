"""What a language model's stage computes while it learns from answers: GRPO's loss, or logarithms of probabilities."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpcdl.distributed.clipped import MEASURED, Answered, LinearClipped, Terms, in_dtype, token_logs
from hpcdl.distributed.decoder import PLAIN_HEADS, Stage, inner
from hpcdl.distributed.engine import Batch, Engine
from hpcdl.distributed.held import Matrix
from hpcdl.distributed.losses import IGNORE
from hpcdl.errors import HpcdlError


def stage_of(module: nn.Module) -> Stage:
    """The stage under its wrapper."""
    (stage,) = [each for each in module.modules() if isinstance(each, Stage)]
    return stage


class Lesson:
    """Stands in the place of a stage's loss. Batches have, besides the model's inputs, what GRPO knows of each row.

    `advantages` and `weights` `(rows,)`; `old` and `reference` `(rows, seq)`, where they are needed.
    """

    names = MEASURED

    def __init__(self, stage: Stage, terms: Terms, device: torch.device) -> None:
        """Takes the place.

        Args:
            stage: whose loss it becomes.
            terms: what the loss is made of.
            device: where the model is.

        Raises:
            HpcdlError: the model's logits are not its head's matrix times the hidden states.
        """
        if not stage.has_plain_head():
            raise HpcdlError(
                "task.method=grpo: the model's logits are not its head's matrix times the hidden states"
                f" ({inner(stage.model).config.model_type}); it takes the plain heads of"
                f" {', '.join(sorted(PLAIN_HEADS))}"
            )
        self._terms = terms
        self._to_come: deque[Batch] = deque()
        self._sums = torch.zeros(len(MEASURED), dtype=torch.float64, device=device)
        stage.loss = self

    def accumulate(self, engine: Engine, batches: Sequence[Batch], answers: int) -> None:
        """Forward and backward passes, as Engine.accumulate; `answers` of all ranks make up the mean."""
        self._to_come.extend(batches)
        engine.accumulate(batches, answers)

    def __call__(self, hidden: Tensor, weight: Tensor | Matrix, labels: Tensor) -> Tensor:
        """The summed loss; without gradients log π of each label, `(batch, seq)`."""
        if isinstance(weight, Matrix):
            weight = weight.whole(hidden.dtype)
        if not torch.is_grad_enabled():
            return token_logs(hidden, weight, labels, self._terms.temperature)
        batch, kept = self._to_come.popleft(), labels != IGNORE
        rows = kept.nonzero()[:, 0]
        known = {name: batch[name][kept] for name in ("old", "reference") if name in batch}
        answered = Answered(
            old=known.get("old"), reference=known.get("reference"),
            advantages=batch["advantages"][rows], weights=batch["weights"][rows],
        )  # fmt: skip
        loss, sums = LinearClipped.apply(  # type: ignore[no-untyped-call]
            in_dtype(hidden[kept]), weight, labels[kept], answered, self._terms, True
        )
        self._sums += sums
        return loss  # type: ignore[no-any-return]

    def measured(self) -> Tensor:
        """This rank's sums since the last call, fp64 `(len(names),)`."""
        found = self._sums.clone()
        self._sums.zero_()
        return found


def logs_of(stage: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Log π of each label, `(rows, seq)`, by the stage under a Lesson; as many batches on every rank."""
    with torch.no_grad():
        found = [stage(each["input_ids"], each["position_ids"], each["labels"])[0] for each in batches]
    return torch.cat(found)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base under its adapter: the policy's reference, without a second copy.

    Not peft's own `disable_adapter`: that takes `requires_grad` away and gives it back, under the eyes of DDP and FSDP.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
