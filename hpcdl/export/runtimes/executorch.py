"""ExecuTorch's own runtime on the CPU (its Python binding, which takes torch's tensors), and the vocabulary beside."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime
from numpy.typing import NDArray

from hpcdl.export.runtimes._beside import Beside


class Opened(Beside):
    """A program; what it remembers lies in its own buffers."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        super().__init__(path.parent)
        portable_lib._unsafe_reset_threadpool(threads)
        self._program = Runtime.get().load_program(path)  # the method doesn't hold it
        self._method: Any = self._program.load_method("forward")
        self._chunk, self._context, self.vocabulary = (
            int(self._program.load_method(f"get_{word}").execute(())[0])
            for word in ("max_seq_len", "max_context_len", "vocab_size")
        )
        self.about = f"ExecuTorch {version('executorch')}, XNNPACK"
        self.fresh()

    def fresh(self) -> None:
        """Later tokens are written over earlier ones, and nobody looks further than the last."""
        self._place = 0

    def feed(self, tokens: Sequence[int], *, every: bool = False) -> NDArray[np.float32]:
        """As many at a time as the program has room for."""
        if self._place + len(tokens) > self._context:
            raise ValueError(f"it was exported for {self._context} tokens at most")
        found = []
        for first in range(0, len(tokens), self._chunk):
            some = list(tokens[first : first + self._chunk])
            places = torch.arange(self._place, self._place + len(some))
            (logits,) = self._method.execute((torch.tensor([some]), places))
            self._place += len(some)
            # the tensor is the program's own memory
            found.append(logits[0].numpy().copy() if every else logits[0, -1].numpy().copy())
        return np.concatenate(found) if every else found[-1]


def open(path: Path, threads: int, context: int) -> Opened:
    """Opens model.pte."""
    return Opened(path, threads, context)
