"""Runtimes of exported models: one file each, found by name, and the process that one of them is used in.

A runtime's file holds `open(path, threads, context) -> Model`. It is imported by that process only (`__main__.py`):
elsewhere `ask` starts it and gives what it found. No runtime but torch's and ExecuTorch's imports torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hpcdl.byname import Folder
from hpcdl.errors import HpcdlError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OVERWRITE_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Model(Protocol):
    """An exported model that a runtime has opened."""

    vocabulary: int
    """Columns of the logits."""
    eos: int
    """Ends a text."""
    prefix: tuple[int, ...]
    """Tokens before each text."""
    template: str | None
    """The chat template."""
    about: str
    """The runtime and its version."""

    def fresh(self) -> None:
        """Forgets all tokens."""

    def feed(self, tokens: Sequence[int], *, every: bool = False) -> NDArray[np.float32]:
        """Takes more tokens; returns fp32 logits `(vocabulary,)` after the last, or `(tokens, vocabulary)`."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokens by the export's own vocabulary, nothing put before them; special words are special tokens."""
        ...

    def decode(self, tokens: Sequence[int]) -> bytes:
        """Text of tokens, special ones left out; a character may be cut in two."""
        ...


class Runtime(Protocol):
    """What a runtime's module offers."""

    def open(self, path: Path, threads: int, context: int) -> Model:
        """Opens an export for at most `context` tokens at a time."""
        ...


_folder: Folder[Runtime] = Folder(__name__, __path__)
names, get = _folder.names, _folder.get
PACKAGES = {
    "executorch": ("executorch", "tokenizers"),
    "llama_cpp": ("llama_cpp",),
    "onnxruntime": ("onnxruntime", "tokenizers"),
    "torch": ("torch", "transformers"),
}
"""What each imports; of a runtime that isn't here, nothing."""


def missing(runtime: str) -> list[str]:
    """Packages that the runtime lacks on this machine."""
    import importlib.util

    return [each for each in PACKAGES.get(runtime, ()) if importlib.util.find_spec(each) is None]


def ask(
    runtime: str,
    action: str,
    path: Path,
    *,
    threads: int,
    cores: Sequence[int] | None = None,
    arrays: Path | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Has a process of its own open the export and do something with it.

    Args:
        runtime: a file of this folder.
        action: a function of hpcdl.export.actions.
        path: the file that the runtime opens.
        threads: that it computes with.
        cores: that it may run on; None: all.
        arrays: folder for what is no text.
        more: what the action wants to know.

    Raises:
        HpcdlError: the runtime isn't installed, or can't open or run the file; holds its own words.
    """
    from hpcdl.export.formats import refuse_missing

    refuse_missing(PACKAGES.get(runtime, ()), f"{path.name}: its runtime {runtime}")
    with tempfile.TemporaryDirectory(prefix="hpcdl-export-") as folder:
        asked = Path(folder) / "asked.json"
        told = Path(folder) / "told.json"
        request: Mapping[str, Any] = {
            "runtime": runtime, "action": action, "path": str(path), "threads": threads,
            "cores": cores, "arrays": str(arrays or folder), **more,
        }  # fmt: skip
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", __name__, str(asked), str(told)]
        # a runtime's libraries have pools of threads besides the one that is asked for
        environment = {**os.environ, **dict.fromkeys(OVERWRITE_THREADS, str(threads))}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, errors="replace"
        )
        found = json.loads(told.read_text(encoding="utf-8")) if told.exists() else None
    if found is None or "error" in found:
        said = (found or {}).get(
            "error"
        ) or f"its process ended with {done.returncode}:\n{done.stderr[-2000:]}"
        raise HpcdlError(f"{runtime} can't run {path.name}: {said}")
    return dict(found)
