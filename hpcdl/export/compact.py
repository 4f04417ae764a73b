"""Neurons that give nothing are left out: a model of `prune=neurons` becomes a narrower one with the same outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MULTIPLE = 32
"""Blocks of few bits have so many columns."""
_NEURONS = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight")


def narrower(folder: Path, out: Path) -> tuple[int, int] | None:
    """Writes the model in `folder` without its dead neurons into the empty folder `out`.

    A neuron is dead whose row of up, or column of down, is zero. All blocks keep as many as the one that needs most.

    Returns:
        Neurons of a block that stay, and that there were; None, and nothing written, where no block can do with fewer.
    """
    import torch

    from hpcdl.distributed import shards

    pieces = shards.pieces(folder)
    alive: dict[str, Tensor] = {}
    for name, piece in pieces.items():
        found = _NEURONS.fullmatch(name)
        if found and found[2] in ("up", "down"):
            used = (piece.read() != 0).any(dim=1 if found[2] == "up" else 0)
            alive[found[1]] = alive[found[1]] & used if found[1] in alive else used
    if not alive:
        return None
    were = len(next(iter(alive.values())))
    most = max(int(each.sum()) for each in alive.values())
    keep = -(-most // MULTIPLE) * MULTIPLE
    if keep >= were:
        return None
    # the living first, filled up with dead ones; in their old order
    chosen = {
        at: torch.argsort((~each).int(), stable=True)[:keep].sort().values for at, each in alive.items()
    }
    made: dict[str, Tensor] = {}
    for name, piece in pieces.items():
        found = _NEURONS.fullmatch(name)
        whole = piece.read()
        if found:
            rows = chosen[found[1]]
            whole = (whole[:, rows] if found[2] == "down" else whole[rows]).contiguous()
        made[name] = whole
    shards.save(out, made)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["intermediate_size"] = keep
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return keep, were
