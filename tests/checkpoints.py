"""Checkpoints made by hand: folders with a record that says what is in them. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpcdl.runs.files import write_json
from hpcdl.spec.checkpoint import TRAINER, crc32_of, name_of, seal

FILES = {".metadata": b"index", "__0_0.distcp": b"tensors of rank 0", "__1_0.distcp": b"tensors of rank 1"}


def fill(folder: Path, step: int) -> dict[str, Any]:
    """Writes files into a folder, and gives the record that goes with them, unsealed."""
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content + b" of step %d" % step)
    paths = sorted(folder.iterdir())
    return {
        "totals": {"step": step, "tokens": 100 * step},
        "world_size": 2,
        "data_digest": "d",
        "seed": 0,
        "global_batch_size": 8,
        "files": {path.name: path.stat().st_size for path in paths},
        "crc32": {path.name: f"{crc32_of(path):08x}" for path in paths},
    }


def make(checkpoints: Path, step: int, **more: Any) -> Path:
    """A whole checkpoint of a step in a run's folder of checkpoints."""
    path = checkpoints / name_of(step)
    write_json(path / TRAINER, seal({**fill(path, step), **more}))
    return path


def flip(file: Path, at: int = 3) -> None:
    """Changes a byte: the length stays."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
