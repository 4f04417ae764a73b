"""A training program's side of training.py: it waits for its turn before it reads a batch, and says what it did.

Standard library only, and what it costs a step is a comparison: the same for every program.

$BENCH_GATE is the socket of training.py, $BENCH_NAME this program's name there, $RANK (0 where there is none) its rank.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any


class Gate:
    """Lets so many steps pass as training.py allows."""

    def __init__(self) -> None:
        self._left = 0
        self._socket: Any = None
        self._wall = self._cpu = 0.0

    def step(self) -> None:
        """To be called before each batch is read: so between two calls lies one whole step of any loop."""
        if not self._left:
            self._wait()
        self._left -= 1

    def _wait(self) -> None:
        wall_s, cpu_s = time.perf_counter() - self._wall, time.process_time() - self._cpu
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(os.environ["BENCH_GATE"])
            self._lines = self._socket.makefile("r")
            self._say({"name": os.environ["BENCH_NAME"], "rank": rank(), "pid": os.getpid()})
        else:
            self._say({"wall_s": wall_s, "cpu_s": cpu_s})
        self._left = int(self._lines.readline())
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def _say(self, word: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(word).encode() + b"\n")


class Record:
    """What the model was given and what loss came of it, step by step; worked out after the last step."""

    def __init__(self) -> None:
        self._tokens: list[Any] = []
        self._losses: list[Any] = []

    def took(self, tokens: Any) -> None:
        """A step's token ids: a tensor, or several micro-batches of them."""
        self._tokens.append(tokens)

    def came(self, loss: Any) -> None:
        """A step's loss, as a function that is called after the last step."""
        self._losses.append(loss)

    def leave(self) -> None:
        """Writes it where training.py looks for it."""
        losses = [loss() for loss in self._losses]
        found = {"hashes": [digest(tokens) for tokens in self._tokens], "losses": losses}
        file = Path(os.environ["BENCH_GATE"]).parent / f"{os.environ['BENCH_NAME']}-{rank()}.json"
        file.write_text(json.dumps(found))


def digest(tokens: Any) -> str:
    """Of a step's token ids, whatever the micro-batches."""
    parts = tokens if isinstance(tokens, list) else [tokens]
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(part.numpy().tobytes())
    return state.hexdigest()


def rank() -> int:
    """This process's rank."""
    return int(os.environ.get("RANK", "0"))
