"""Examples → rows of seq_len + 1 tokens, with flags that keep documents apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from hpcdl.worker.data.records import Example

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

START = 1
"""Flag: this token begins a document."""
TARGET = 2
"""Flag: the model learns to predict this token."""
PAD = 4
"""Flag: this token only fills the row."""

Piece = tuple[list[int], list[int]]
"""Tokens and their flags, equally long."""


def flags_of(example: Example) -> list[int]:
    """`(length,)`: the first token starts the document and is predicted from nothing, so it is no target."""
    flags = [TARGET if target else 0 for target in example.targets]
    flags[0] = START
    return flags


def rows(examples: Iterable[Example], length: int, *, packing: bool, cut: bool) -> Iterator[Piece]:
    """Pieces of at most `length` tokens, each of which becomes a row.

    - cut, packing: all documents one after the other; a row's last token is the next row's first,
      so that each token is a target once.
    - cut, no packing: the same for each document alone.
    - no cut, packing: whole examples side by side while they fit.
    - no cut, no packing: an example a row. Examples that are too long lose their end.

    Args:
        examples: documents as tokens.
        length: tokens of a row: seq_len + 1.
        packing: several documents a row.
        cut: documents may be cut.
    """
    tokens: list[int] = []
    flags: list[int] = []
    for example in examples:
        new, new_flags = example.tokens, flags_of(example)
        if not cut:
            new, new_flags = new[:length], new_flags[:length]
            if not any(flag & TARGET for flag in new_flags):
                continue  # the question alone fills the row
        if tokens and (not packing or (not cut and len(tokens) + len(new) > length)):
            yield tokens, flags
            tokens, flags = [], []
        tokens, flags = tokens + new, flags + new_flags
        at = 0
        while len(tokens) - at >= length and cut:
            yield tokens[at : at + length], flags[at : at + length]
            at += length - 1
        tokens, flags = tokens[at:], flags[at:]
    if tokens:
        yield tokens, flags


def fill(
    pieces: Iterable[Piece], length: int, pad_id: int, dtype: type[np.unsignedinteger]
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.uint8], NDArray[np.int64]]:
    """Pieces as arrays; those without a single target are left out.

    Returns:
        tokens `(rows, length)`, flags `(rows, length)`, counts `(rows, 2)`: targets, and input tokens that
        are no padding.
    """
    import numpy as np

    kept_tokens, kept_flags, counts = [], [], []
    for tokens, flags in pieces:
        row = np.full(length, pad_id, dtype)
        row_flags = np.full(length, PAD, np.uint8)
        row[: len(tokens)] = tokens
        row_flags[: len(flags)] = flags
        targets = int(np.count_nonzero(row_flags[1:] & TARGET))
        if targets:
            kept_tokens.append(row)
            kept_flags.append(row_flags)
            counts.append((targets, int(np.count_nonzero(~row_flags[:-1] & PAD))))
    if not counts:
        return np.zeros((0, length), dtype), np.zeros((0, length), np.uint8), np.zeros((0, 2), np.int64)
    return np.stack(kept_tokens), np.stack(kept_flags), np.array(counts, np.int64)
