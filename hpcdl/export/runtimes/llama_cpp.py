"""llama.cpp, through the low-level side of llama-cpp-python: its own loader, vocabulary, kernels and KV cache."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as c
import numpy as np
from numpy.typing import NDArray

BATCH = 64
"""Tokens that are computed together."""
SPECIAL = 8
"""llama.cpp's attribute of control tokens."""


class Opened:
    """A GGUF file."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        self._said: list[str] = []
        c.llama_log_set(_keep(self._said), None)
        how = c.llama_model_default_params()
        how.n_gpu_layers = 0
        self._model = c.llama_model_load_from_file(str(path).encode(), how)
        if not self._model:
            raise ValueError(self._why("the file can't be loaded"))
        run = c.llama_context_default_params()
        run.n_ctx, run.n_batch, run.n_ubatch = context, BATCH, BATCH
        run.n_threads = run.n_threads_batch = threads
        self._context = c.llama_init_from_model(self._model, run)
        if not self._context:
            raise ValueError(self._why("no context can be made"))
        self._words = c.llama_model_get_vocab(self._model)
        self.vocabulary = int(c.llama_vocab_n_tokens(self._words))
        self.eos = int(c.llama_vocab_eos(self._words))
        begins = bool(c.llama_vocab_get_add_bos(self._words))
        self.prefix = (int(c.llama_vocab_bos(self._words)),) if begins else ()
        template = c.llama_model_chat_template(self._model, None)
        self.template = template.decode() if template else None
        self.about = f"llama.cpp through llama-cpp-python {c.__version__}"
        self._batch = c.llama_batch_init(BATCH, 0, 1)
        self._place = 0

    def fresh(self) -> None:
        """Forgets all tokens."""
        c.llama_memory_clear(c.llama_get_memory(self._context), True)
        self._place = 0

    def feed(self, tokens: Sequence[int], *, every: bool = False) -> NDArray[np.float32]:
        """Takes more tokens, BATCH at a time."""
        found = []
        for at in range(0, len(tokens), BATCH):
            part = tokens[at : at + BATCH]
            last = at + BATCH >= len(tokens)
            self._fill(part, every=every, last=last)
            code = c.llama_decode(self._context, self._batch)
            if code:
                raise ValueError(self._why(f"llama_decode says {code}"))
            if every:
                found += [self._logits(place) for place in range(len(part))]
            elif last:
                found = [self._logits(len(part) - 1)]
        return np.stack(found) if every else found[0]

    def encode(self, text: str) -> list[int]:
        """By the vocabulary in the file."""
        raw = text.encode()
        room = len(raw) + 16
        ids = (c.llama_token * room)()
        count = c.llama_tokenize(self._words, raw, len(raw), ids, room, False, True)
        if count < 0:
            raise ValueError(f"{len(raw)} bytes of text become {-count} tokens")
        return list(ids[:count])

    def decode(self, tokens: Sequence[int]) -> bytes:
        """Pieces, one after the other."""
        piece = ctypes.create_string_buffer(512)
        parts = []
        for token in tokens:
            size = c.llama_token_to_piece(self._words, token, piece, 512, 0, False)
            parts.append(piece.raw[: max(0, size)])
        return b"".join(parts)

    def _fill(self, part: Sequence[int], *, every: bool, last: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(part)
        for place, token in enumerate(part):
            batch.token[place] = token
            batch.pos[place] = self._place + place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = every or (last and place == len(part) - 1)
        self._place += len(part)

    def _logits(self, place: int) -> NDArray[np.float32]:
        found = c.llama_get_logits_ith(self._context, place)
        return np.ctypeslib.as_array(found, shape=(self.vocabulary,)).copy()

    def _why(self, what: str) -> str:
        said = " ".join(line.strip() for line in self._said[-6:])
        return f"{what}: {said}" if said else what


def _keep(said: list[str]) -> Any:
    """A log of llama.cpp's warnings and errors; kept alive, for llama.cpp calls it for good."""

    @c.llama_log_callback  # type: ignore[untyped-decorator]
    def listen(level: int, text: bytes, _: Any) -> None:
        if level >= 3:
            said.append(text.decode(errors="replace"))

    _LISTENERS.append(listen)
    return listen


_LISTENERS: list[Any] = []


def open(path: Path, threads: int, context: int) -> Opened:
    """Opens a GGUF file."""
    return Opened(path, threads, context)
