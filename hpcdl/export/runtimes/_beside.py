"""The vocabulary of exports that don't carry one: the tokenizer's files beside them, without transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


class Beside:
    """tokenizer.json and vocabulary.json of an export's folder."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._words = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._words.no_truncation()
        self._words.no_padding()
        told = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        self.eos = int(told["eos"])
        self.prefix = tuple(told["prefix"])
        self.template: str | None = told["template"]

    def encode(self, text: str) -> list[int]:
        """Nothing put before the tokens."""
        return list(self._words.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> bytes:
        """Special tokens left out."""
        return str(self._words.decode(list(tokens), skip_special_tokens=True)).encode()
