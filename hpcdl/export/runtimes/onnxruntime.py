"""ONNX Runtime on the CPU, and the vocabulary that lies beside the graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from hpcdl.export.runtimes._beside import Beside


class Opened(Beside):
    """A graph with its keys and values."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        super().__init__(path.parent)
        how = onnxruntime.SessionOptions()
        how.intra_op_num_threads, how.inter_op_num_threads = threads, 1
        how.log_severity_level = 3
        # threads that wait for work without sleeping take a small device's cores
        how.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(path), how, providers=["CPUExecutionProvider"])
        self._outs = [each.name for each in self._session.get_outputs()]
        self.vocabulary = int(self._session.get_outputs()[0].shape[-1])
        self._shapes = {
            each.name: (1, each.shape[1], 0, each.shape[3])
            for each in self._session.get_inputs()
            if each.name.startswith("past_key_values.")
        }
        self.about = f"onnxruntime {onnxruntime.__version__}"
        self.fresh()

    def fresh(self) -> None:
        """Forgets all tokens."""
        self._past: dict[str, Any] = {
            name: np.zeros(shape, np.float32) for name, shape in self._shapes.items()
        }
        self._place = 0

    def feed(self, tokens: Sequence[int], *, every: bool = False) -> NDArray[np.float32]:
        """What the graph says is present is the next call's past."""
        first, self._place = self._place, self._place + len(tokens)
        given = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, self._place), np.int64),
            "position_ids": np.arange(first, self._place, dtype=np.int64)[None],
            **self._past,
        }
        found = dict(zip(self._outs, self._session.run(None, given), strict=True))
        self._past = {name: found[name.replace("past_key_values", "present")] for name in self._past}
        logits: NDArray[np.float32] = found["logits"][0]
        return logits if every else logits[-1]


def open(path: Path, threads: int, context: int) -> Opened:
    """Opens model.onnx."""
    return Opened(path, threads, context)
