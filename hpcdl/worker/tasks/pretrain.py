"""Pretraining: predict the next token on all text."""

from __future__ import annotations

from hpcdl.worker.data.records import Example, Record
from hpcdl.worker.tokenizer import Tokenizer

CUTS_DOCUMENTS = True


def example(record: Record, tokenizer: Tokenizer) -> Example | None:
    """The document's text, ended by end-of-text; every token is a target. Conversations become their text."""
    text = record.text
    if text is None:
        text = tokenizer.chat(record.messages, answer_next=False)
    if not text:
        return None
    tokens = [*tokenizer.prefix, *tokenizer.encode(text), tokenizer.eos_id]
    return Example(tokens=tokens, targets=[True] * len(tokens))


def prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """The beginning of a document."""
    return [*tokenizer.prefix, *tokenizer.encode(text)]
