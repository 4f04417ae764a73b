"""Where documents come from. One function a kind; each yields records, and names its content by a digest."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpcdl.errors import HpcdlError
from hpcdl.spec import DataSpec
from hpcdl.worker.data.records import Record

TEXT_DOCUMENT_CHARS = 2000
"""A text file's paragraphs are joined to documents of at least this length."""


class Source(ABC):
    """Documents of one kind; `digest` names their content, `records()` reads them."""

    def __init__(self, spec: DataSpec, seed: int) -> None:
        self._spec = spec
        self._seed = seed

    @abstractmethod
    def digest(self) -> str:
        """Changes whenever any document may have changed."""

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """All documents, in the source's own order.

        Raises:
            HpcdlError: a file is missing or isn't what its kind says.
        """


class Pydoc(Source):
    """Python's own reference text (`pydoc_data.topics`), one topic a document."""

    def digest(self) -> str:
        """Of the text: it changes with Python's version."""
        return _hash("".join(r.text or "" for r in self.records()))

    def records(self) -> Iterator[Record]:
        """The topics, by name."""
        try:
            from pydoc_data.topics import topics
        except ImportError as error:  # some distributions split it off
            raise HpcdlError(
                "data=pydoc: this Python comes without pydoc_data (its reference text)"
            ) from error
        for name in sorted(topics):
            yield Record(text=topics[name])


class Text(Source):
    """Text files, cut at blank lines into documents of some thousand characters."""

    def digest(self) -> str:
        """Of the files' content."""
        return _files_digest(_files(self._spec))

    def records(self) -> Iterator[Record]:
        """Paragraphs of each file, joined up to TEXT_DOCUMENT_CHARS."""
        for path in _files(self._spec):
            part: list[str] = []
            for paragraph in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
                part.append(paragraph)
                if sum(map(len, part)) >= TEXT_DOCUMENT_CHARS:
                    yield Record(text="\n\n".join(part))
                    part = []
            rest = "\n\n".join(part)
            if rest.strip():
                yield Record(text=rest)


class Jsonl(Source):
    """Lines of JSON: conversations, prompt/answer pairs, or plain text."""

    def digest(self) -> str:
        """Of the files' content."""
        return _files_digest(_files(self._spec))

    def records(self) -> Iterator[Record]:
        """A document a line."""
        for path in _files(self._spec):
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _parse(self._spec, line, f"{path}:{number}")


class Hf(Source):
    """A dataset of the `datasets` library: a folder that save_to_disk wrote, or anything load_dataset takes."""

    def __init__(self, spec: DataSpec, seed: int) -> None:
        super().__init__(spec, seed)
        self._rows = _load_dataset(spec)

    def digest(self) -> str:
        """The dataset's own fingerprint."""
        return str(self._rows._fingerprint)

    def records(self) -> Iterator[Record]:
        """A document a row."""
        for number, row in enumerate(self._rows):
            yield to_record(self._spec, row, f"{self._spec.dataset}[{number}]")


class Synthetic(Source):
    """Sentences of a small grammar with sums in them: learnable within some dozen steps."""

    def digest(self) -> str:
        """Of what the documents are made from."""
        return f"synthetic-1-{self._seed}-{self._spec.num_samples}"

    def records(self) -> Iterator[Record]:
        """Each document is text, and question and answer too, so that every task can use it."""
        rng = random.Random(self._seed)
        names, things = ("Ada", "Alan", "Grace", "Kurt"), ("apples", "books", "cats", "dice", "eggs")
        for _ in range(self._spec.num_samples):
            name, thing = rng.choice(names), rng.choice(things)
            first, second = rng.randrange(10), rng.randrange(10)
            question = f"{name} has {first} {thing} and finds {second} {thing}. How many?"
            answer = f"{name} has {first + second} {thing}."
            messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
            yield Record(text=f"{question} {answer}\n", messages=messages)


KINDS: Mapping[str, type[Source]] = {
    "pydoc": Pydoc,
    "text": Text,
    "jsonl": Jsonl,
    "hf": Hf,
    "synthetic": Synthetic,
}


def to_record(spec: DataSpec, row: Mapping[str, Any], where: str) -> Record:
    """A row as a document: a conversation, else a pair, else plain text.

    Raises:
        HpcdlError: it has none of the three; says which fields it has.
    """
    if row.get(spec.messages_field) is not None:
        turns = row[spec.messages_field]
        if not isinstance(turns, list) or not all(
            isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in turns
        ):
            raise HpcdlError(f"{where}: {spec.messages_field} must be a list of {{role, content}}")
        return Record(messages=tuple({"role": str(t["role"]), "content": str(t["content"])} for t in turns))
    if row.get(spec.prompt_field) is not None and row.get(spec.answer_field) is not None:
        asked = {"role": "user", "content": str(row[spec.prompt_field])}
        return Record(messages=(asked, {"role": "assistant", "content": str(row[spec.answer_field])}))
    if row.get(spec.text_field) is not None:
        return Record(text=str(row[spec.text_field]))
    wanted = f"{spec.messages_field}, or {spec.prompt_field} and {spec.answer_field}, or {spec.text_field}"
    raise HpcdlError(f"{where}: has {', '.join(map(str, row)) or 'no fields'}, but needs {wanted}")


def _parse(spec: DataSpec, line: str, where: str) -> Record:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise HpcdlError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise HpcdlError(f"{where}: not a JSON object")
    return to_record(spec, row, where)


def _files(spec: DataSpec) -> list[Path]:
    found: list[Path] = []
    for pattern in spec.paths:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))  # noqa: PTH207, PTH111
        files = [Path(m) for m in matches if os.path.isfile(m)]  # noqa: PTH113
        if not files:
            raise HpcdlError(f"data.paths: {pattern} matches no file on {os.uname().nodename}")
        found += files
    return found


def _files_digest(files: list[Path]) -> str:
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "blake2b").hexdigest())
    return _hash("".join(digests))


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _load_dataset(spec: DataSpec) -> Any:
    try:
        from datasets import load_dataset, load_from_disk
    except ImportError as error:
        raise HpcdlError("data=hf needs the datasets library: pip install 'hpcdl[hf]'") from error
    name = str(spec.dataset)
    try:
        if (Path(name) / "dataset_dict.json").is_file():
            return load_from_disk(name)[spec.dataset_split]
        if (Path(name) / "dataset_info.json").is_file():
            return load_from_disk(name)
        return load_dataset(name, spec.dataset_config, split=spec.dataset_split)
    except (OSError, ValueError, KeyError) as error:
        raise HpcdlError(
            f"data.dataset={name} can't be loaded: {error}\nWhere this node has no internet, save it elsewhere"
            " (dataset.save_to_disk(FOLDER)), copy the folder, and give data.dataset=FOLDER"
        ) from error
