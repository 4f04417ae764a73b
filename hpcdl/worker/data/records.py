"""A document before and after tokenisation."""

from __future__ import annotations

from dataclasses import dataclass

from hpcdl.worker.tokenizer import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One document: plain text, a conversation, or (synthetic) both."""

    text: str | None = None
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One document as tokens."""

    tokens: list[int]
    """`(length,)`"""
    targets: list[bool]
    """`(length,)`: whether the model shall learn to predict this token from those before it."""
