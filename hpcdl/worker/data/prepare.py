"""Split, tokenise and pack once; afterwards every rank maps the same files from the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdl.errors import HpcdlError
from hpcdl.spec import ExperimentSpec
from hpcdl.worker import tasks
from hpcdl.worker.cache import cache_dir, once
from hpcdl.worker.data.pack import fill, rows
from hpcdl.worker.data.records import Example, Record
from hpcdl.worker.data.sources import KINDS, Source
from hpcdl.worker.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VERSION = 1
"""Part of the cache's name: raise it when the same documents become other rows."""


@dataclass(frozen=True, slots=True)
class Rows:
    """One part of the data, memory-mapped."""

    tokens: NDArray[np.unsignedinteger]
    """`(rows, seq_len + 1)`"""
    flags: NDArray[np.uint8]
    """`(rows, seq_len + 1)`: START, TARGET, PAD of hpcdl.worker.data.pack."""
    counts: NDArray[np.int64]
    """`(rows, 2)`: targets, and input tokens that are no padding."""

    def __len__(self) -> int:
        return len(self.counts)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Training and held-out rows; no document is in both."""

    train: Rows
    heldout: Rows
    digest: str
    """Names the content: two runs with the same digest see the same rows."""


def heldout_indices(documents: int, fraction: float, seed: int) -> frozenset[int]:
    """Which documents are held out: those whose hash with the seed is lowest; at least one.

    Stable: it depends on nothing but the three arguments.
    """
    count = max(1, round(documents * fraction))

    def key(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=16).digest()

    return frozenset(sorted(range(documents), key=key)[:count])


def open_dataset(spec: ExperimentSpec, tokenizer: Tokenizer) -> Dataset:
    """The experiment's rows, from the cache; made first by one process where they aren't there.

    Raises:
        HpcdlError: documents can't be read, or there are too few.
    """
    source = KINDS[spec.data.kind](spec.data, spec.seed)
    data = spec.data
    parts: Sequence[Any] = (
        VERSION, data.kind, source.digest(), tokenizer.digest, spec.task.name, spec.seed, data.split, data.seq_len,
        data.packing, data.text_field, data.messages_field, data.prompt_field, data.answer_field,
    )  # fmt: skip
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
    folder = once(
        cache_dir() / "data" / f"{data.kind}-{digest}", lambda path: _build(path, spec, source, tokenizer)
    )
    dataset = Dataset(train=_open(folder, "train"), heldout=_open(folder, "heldout"), digest=digest)
    _check_enough(spec, dataset)
    return dataset


def _build(folder: Path, spec: ExperimentSpec, source: Source, tokenizer: Tokenizer) -> None:
    import numpy as np

    task = tasks.get(spec.task.name)
    records = list(source.records())
    if len(records) < 2:
        raise HpcdlError(
            f"data={spec.data.kind} has {len(records)} document{'s' * (len(records) != 1)}:"
            " at least 2 are needed, one to train on and one to hold out"
        )
    heldout = heldout_indices(len(records), spec.data.split, spec.seed)
    length = spec.data.seq_len + 1

    def examples(chosen: Iterator[Record]) -> Iterator[Example]:
        for record in chosen:
            made = task.example(record, tokenizer)
            if made is not None:
                yield made

    for name, wanted in (("heldout", True), ("train", False)):
        chosen = (record for index, record in enumerate(records) if (index in heldout) is wanted)
        pieces = rows(examples(chosen), length, packing=spec.data.packing, cut=task.CUTS_DOCUMENTS)
        tokens, flags, counts = fill(pieces, length, tokenizer.pad_id, np.uint32)
        if tokens.size and int(tokens.max()) < 2**16:
            tokens = tokens.astype(np.uint16)
        for part, array in (("tokens", tokens), ("flags", flags), ("counts", counts)):
            np.save(folder / f"{name}-{part}.npy", array)


def _open(folder: Path, name: str) -> Rows:
    import numpy as np

    def part(kind: str) -> Any:
        path = folder / f"{name}-{kind}.npy"
        array = np.load(path, mmap_mode=None if kind == "counts" else "r")
        return array

    return Rows(part("tokens"), part("flags"), part("counts"))


def _check_enough(spec: ExperimentSpec, dataset: Dataset) -> None:
    have, need = len(dataset.train), spec.trainer.global_batch_size
    if have < need:
        raise HpcdlError(
            f"too little data: {have} training sequences of {spec.data.seq_len} tokens, but one step takes"
            f" trainer.global_batch_size={need}. Give more text, a smaller batch, or a smaller data.seq_len"
        )
    if not len(dataset.heldout):
        raise HpcdlError(
            f"too little data: data.split={spec.data.split} leaves no held-out sequence with a target;"
            " give more text, or a larger data.split"
        )
