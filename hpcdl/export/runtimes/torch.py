"""transformers on torch: for folders of safetensors, in the very numbers that lie there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpcdl.export.runtimes._beside import Beside
from hpcdl.foreign import ONLY_WEIGHTS


class Opened(Beside):
    """A folder that from_pretrained reads."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        import transformers
        from transformers.utils import logging

        super().__init__(path.parent)
        torch.set_num_threads(threads)
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), dtype="auto", **ONLY_WEIGHTS
        )
        self._model = model.eval()
        self.vocabulary = int(model.config.vocab_size)
        self.about = f"transformers {transformers.__version__} on torch {torch.__version__}"
        self._past: Any = None

    def fresh(self) -> None:
        """Forgets all tokens."""
        self._past = None

    def feed(self, tokens: Sequence[int], *, every: bool = False) -> NDArray[np.float32]:
        """Through transformers' own cache of keys and values."""
        with torch.no_grad():
            out = self._model(
                input_ids=torch.tensor([list(tokens)]), past_key_values=self._past, use_cache=True,
                logits_to_keep=0 if every else 1,
            )  # fmt: skip
        self._past = out.past_key_values
        logits: NDArray[np.float32] = out.logits[0].float().numpy()
        return logits if every else logits[-1]


def open(path: Path, threads: int, context: int) -> Opened:
    """Opens model.safetensors with what lies beside it."""
    return Opened(path, threads, context)
