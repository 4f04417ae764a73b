"""Tasks: what a document becomes, and what the result card samples. One file each, found by name.

A task's file holds

- `CUTS_DOCUMENTS`: whether a document may be cut where a sequence is full;
- `example(record, tokenizer) -> Example | None`: a document as tokens, and which of them are targets;
- `prompt(text, tokenizer) -> list[int]`: the tokens that the sample on the result card starts from;
- where the loss is not the text's cross-entropy: `attach(spec, engine) -> Lesson`, which changes it;
- where no text is trained on: `train(spec, run, who, device, stop, progress)`, in the place of
  hpcdl.worker.training.train.

Its light side, with its own keys, is the file of the same name in hpcdl/tasks/.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, cast

from hpcdl.spec import ExperimentSpec
from hpcdl.worker.data.records import Example, Record
from hpcdl.worker.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from hpcdl.distributed.engine import Engine


class Task(Protocol):
    """What a task's module offers."""

    CUTS_DOCUMENTS: bool

    def example(self, record: Record, tokenizer: Tokenizer) -> Example | None:
        """Tokens and targets of one document; None where nothing in it can be a target."""
        ...

    def prompt(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """Tokens that a sample starts from."""
        ...


class Lesson(Protocol):
    """What a task does to the loss while the model trains."""

    @property
    def names(self) -> Sequence[str]:
        """What it measures, by the names that metrics.jsonl has."""
        ...

    def measured(self) -> Tensor:
        """This rank's sums over target tokens since the last call, fp64 `(len(names),)`."""
        ...


def attach(spec: ExperimentSpec, engine: Engine) -> Lesson | None:
    """Has the task change the loss; None where it is the text's cross-entropy. On all ranks together."""
    change: Callable[[ExperimentSpec, Engine], Lesson] | None = getattr(get(spec.task.name), "attach", None)
    return None if change is None else change(spec, engine)


def own_work(spec: ExperimentSpec) -> Callable[..., None] | None:
    """What the task does in the place of hpcdl.worker.training.train; None where it trains on text."""
    work: Callable[..., None] | None = getattr(get(spec.task.name), "train", None)
    return work


def get(name: str) -> Task:
    """The task called `name`: a file of this folder."""
    return cast(Task, importlib.import_module(f"{__name__}.{name}"))
