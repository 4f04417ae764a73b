"""Which text is trained on, and how it becomes sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """A source of text; the position in it is (seed, epoch, global sample index), whatever the rank count."""

    kind: Literal["pydoc", "text", "jsonl", "hf", "synthetic", "none"]
    """`pydoc`: the reference text that every Python ships; `text`: files; `jsonl`: conversations or
    prompt/answer pairs; `hf`: a datasets name or folder; `synthetic`: random tokens with structure; `none`: no
    text, the task makes its own samples."""
    paths: tuple[str, ...] = ()
    """Files or globs, for `text` and `jsonl`."""
    dataset: str | None = None
    """A datasets name or a local folder, for `hf`."""
    dataset_config: str | None = None
    """The dataset's configuration, for `hf`."""
    dataset_split: str = "train"
    """The dataset's split, for `hf`."""
    text_field: str = "text"
    """Field that holds the text, for `hf` and for `jsonl` lines that are plain text."""
    messages_field: str = "messages"
    """Field that holds a conversation: a list of {role, content}, for `jsonl` and `hf`."""
    prompt_field: str = "prompt"
    """Field that holds the question of an instruction pair."""
    answer_field: str = "answer"
    """Field that holds the answer of an instruction pair."""
    seq_len: Annotated[int, Ge(8)] = 256
    """Length of a training sequence, in tokens."""
    packing: bool = True
    """Fill each sequence with several documents (true), or one document a sequence, padded (false)."""
    split: Annotated[float, Interval(gt=0, lt=1)] = 0.05
    """Fraction of the documents that is held out for evaluation, chosen by the seed."""
    num_samples: Annotated[int, Ge(1)] = 2048
    """Documents to make, for `synthetic`."""
    workers: Annotated[int, Ge(0)] = 0
    """Processes of each rank that build micro-batches ahead of time; 0: the rank builds them itself. They pay
    where rows are slow to read; the batches are the same whatever the number."""
    prefetch: Annotated[int, Ge(1)] = 4
    """Micro-batches that each of them holds ready."""
