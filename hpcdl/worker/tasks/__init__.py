"""Tasks: what a document becomes, and what the result card samples. One file each, found by name.

A task's file holds

- `CUTS_DOCUMENTS`: whether a document may be cut where a sequence is full;
- `example(record, tokenizer) -> Example | None`: a document as tokens, and which of them are targets;
- `prompt(text, tokenizer) -> list[int]`: the tokens that the sample on the result card starts from.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from hpcdl.worker.data.records import Example, Record
from hpcdl.worker.tokenizer import Tokenizer


class Task(Protocol):
    """What a task's module offers."""

    CUTS_DOCUMENTS: bool

    def example(self, record: Record, tokenizer: Tokenizer) -> Example | None:
        """Tokens and targets of one document; None where nothing in it can be a target."""
        ...

    def prompt(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """Tokens that a sample starts from."""
        ...


def get(name: str) -> Task:
    """The task called `name`: a file of this folder."""
    return cast(Task, importlib.import_module(f"{__name__}.{name}"))
