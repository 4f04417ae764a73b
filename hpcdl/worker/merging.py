"""Adapters into their base: a new folder of weights, written a tensor at a time.

The base is what lies in its folder, in 16 or 32 bits, also where training held it in fewer: an update that is
added to weights that were quantized and made whole again would add their errors for good. Sums are taken in
fp32 and rounded once to the base's own dtype. Names, shapes, dtypes and files are the base's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpcdl.distributed import shards
from hpcdl.distributed.shards import Piece
from hpcdl.errors import HpcdlError
from hpcdl.worker.adapters import Update

PLAIN = (torch.float32, torch.bfloat16, torch.float16)
"""What a matrix that gets an update may be held in."""
BESIDE = ("config.json", "generation_config.json", shards.INDEX)
"""Files of the base that go over as they are."""


def merge(base: Path, updates: Sequence[Update], out: Path) -> dict[str, Any]:
    """Writes base + updates into the folder `out`.

    Args:
        base: folder with config.json and safetensors.
        updates: what is added.
        out: an empty folder.

    Returns:
        `matrices` that were changed, `files`, and the `dtype` that they have.

    Raises:
        HpcdlError: the base is quantized, torn, or not that of the updates; the disk is full.
    """
    config = _config(base)
    there = shards.pieces(base)
    for update in updates:
        _refuse_lost(update, there.keys(), base, tied=bool(config.get("tie_word_embeddings")))
    changed: dict[str, torch.dtype] = {}

    def change(piece: Piece) -> Tensor | None:
        wanted = [update for update in updates if piece.name in update.modules]
        if not wanted:
            return None
        if piece.dtype not in PLAIN:
            raise HpcdlError(
                f"{piece} is held in {piece.dtype}: merge into the original 16-bit weights instead"
            )
        whole = piece.read().float()
        delta = wanted[0].of(piece.name, whole)
        for update in wanted[1:]:
            delta += update.of(piece.name, whole)
        changed[piece.name] = piece.dtype
        return whole.add_(delta).to(piece.dtype)

    files = sorted({piece.file for piece in there.values()})
    for file in files:
        shards.rewrite(file, out / file.name, change)
    for name in BESIDE:
        if (base / name).exists():
            shutil.copyfile(base / name, out / name)
    assert changed.keys() == {name for update in updates for name in update.modules}
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype in changed.values()})
    return {"matrices": len(changed), "files": len(files), "dtype": ", ".join(dtypes)}


def _config(base: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HpcdlError(f"{base / 'config.json'} can't be read: {error}") from error
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "")
        raise HpcdlError(
            f"{base} is quantized ({method}): an update that is merged into it keeps its errors for good. Give the"
            " model that it was made from: hpcdl merge THAT_MODEL --adapter …"
        )
    return config


def _refuse_lost(update: Update, there: Collection[str], base: Path, *, tied: bool) -> None:
    """Raises where the base has no such matrix."""
    lost = sorted(update.modules.keys() - set(there))
    if not lost:
        return
    path = update.adapter.path
    if tied and lost[0].startswith("lm_head."):
        raise HpcdlError(
            f"{path} changes the output head, which is the embedding too in {base}: merged, it would change the"
            " embedding, which it was not trained to"
        )
    raise HpcdlError(
        f"{base} has no {lost[0]}, which {path} changes ({len(lost)} such in all): it is of another model"
    )
