"""Text ↔ token ids: one token a byte, or the tokenizer that lies beside the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from hpcdl.errors import HpcdlError
from hpcdl.foreign import NO_CODE
from hpcdl.spec.model import BYTE_TOKENIZER

Message = Mapping[str, str]
"""One turn of a conversation: `{"role": "user" | "assistant" | "system", "content": …}`."""


class Tokenizer(Protocol):
    """What tasks and the result need of a tokenizer."""

    @property
    def eos_id(self) -> int:
        """End of text; also what separates packed documents."""
        ...

    @property
    def pad_id(self) -> int:
        """Fills what is left of a sequence; never a target."""
        ...

    @property
    def prefix(self) -> tuple[int, ...]:
        """Tokens before each document (beginning of text), where the tokenizer has them."""
        ...

    @property
    def digest(self) -> str:
        """Changes whenever any text might be tokenised differently."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no special tokens added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        ...

    def chat(self, messages: Sequence[Message], *, answer_next: bool) -> str:
        """A conversation as text, ended by the start of an answer where `answer_next`."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files into `folder`."""
        ...


def plain_chat(messages: Sequence[Message], *, answer_next: bool, end: str) -> str:
    """The template of tokenizers that have none: `Role: content`, a blank line between, `end` after answers."""
    parts = [
        f"{m['role'].capitalize()}: {m['content']}{end if m['role'] == 'assistant' else ''}\n\n"
        for m in messages
    ]
    return "".join(parts) + ("Assistant: " if answer_next else "")


class ByteTokenizer:
    """One token a byte (UTF-8), and four more: 256 bos, 257 eos, 258 pad, 259 end of turn."""

    bos_id = 256
    eos_id = 257
    pad_id = 258
    prefix: tuple[int, ...] = (256,)
    digest = "byte-1"
    vocab_size = 260
    _turn = "\0"  # stands for token 259: a byte that text doesn't hold

    def encode(self, text: str) -> list[int]:
        """One id a byte."""
        return [259 if byte == 0 else byte for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are no UTF-8 become �."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def chat(self, messages: Sequence[Message], *, answer_next: bool) -> str:
        """`plain_chat`, with the end-of-turn token after each answer."""
        return plain_chat(messages, answer_next=answer_next, end=self._turn)

    def save(self, folder: Path) -> None:
        """Says in a file which id is what."""
        ids = {"bytes": "0-255", "bos": 256, "eos": 257, "pad": 258, "end_of_turn": 259}
        (folder / BYTE_TOKENIZER).write_text(json.dumps(ids, indent=1) + "\n")


class HfTokenizer:
    """A tokenizer of transformers, loaded when it is first asked for text: a warm cache never asks."""

    def __init__(self, source: str, revision: str | None = None) -> None:
        self._source = source
        self._revision = revision

    @cached_property
    def _hf(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self._source, revision=self._revision, **NO_CODE)
        except (OSError, ValueError) as error:
            raise HpcdlError(
                f"no tokenizer could be loaded from {self._source}: {error}\n"
                "Put the tokenizer's files beside the weights, or use model.tokenizer=byte"
            ) from error

    @cached_property
    def eos_id(self) -> int:
        """`eos_token`."""
        if self._hf.eos_token_id is None:
            raise HpcdlError(f"the tokenizer of {self._source} has no end-of-text token (eos_token)")
        return int(self._hf.eos_token_id)

    @cached_property
    def pad_id(self) -> int:
        """`pad_token`, or end-of-text where there is none."""
        return self.eos_id if self._hf.pad_token_id is None else int(self._hf.pad_token_id)

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """`bos_token`, for tokenizers that add it by themselves."""
        first = self._hf("a")["input_ids"][:1]
        return tuple(first) if first == [self._hf.bos_token_id] else ()

    @cached_property
    def digest(self) -> str:
        """Of the tokenizer's files where it is a folder (quick), else of the loaded tokenizer."""
        folder = Path(self._source)
        if folder.is_dir():
            found = hashlib.blake2b(digest_size=16)
            for path in sorted(_tokenizer_files(folder)):
                found.update(path.name.encode() + path.read_bytes())
            return found.hexdigest()
        text = json.dumps([sorted(self._hf.get_vocab().items()), self._hf.chat_template, str(self._hf)])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; a chat template's special tokens in it become their ids."""
        return list(self._hf.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return str(self._hf.decode(list(ids), skip_special_tokens=True))

    def chat(self, messages: Sequence[Message], *, answer_next: bool) -> str:
        """The tokenizer's own chat template, or `plain_chat` where it has none."""
        if self._hf.chat_template is None:
            return plain_chat(messages, answer_next=answer_next, end=str(self._hf.eos_token))
        text = self._hf.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=answer_next
        )
        return str(text)

    def save(self, folder: Path) -> None:
        """Writes what AutoTokenizer reads."""
        self._hf.save_pretrained(folder)


def _tokenizer_files(folder: Path) -> Iterator[Path]:
    for pattern in (
        "tokenizer*",
        "vocab*",
        "merges*",
        "special_tokens*",
        "added_tokens*",
        "chat_template*",
        "*.model",
    ):
        yield from (path for path in folder.glob(pattern) if path.is_file())
