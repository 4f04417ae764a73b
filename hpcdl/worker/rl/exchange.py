"""Every rank's rows on all ranks, in the order of ranks: what each trains on is then no matter of who took it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def all_rows(mine: Mapping[str, Tensor], ranks: int) -> dict[str, Tensor]:
    """The rows of ranks that have other samples, one after another.

    Args:
        mine: tensors with the same number of rows each; other ranks may have other numbers, none included.
        ranks: how many ranks there are; all of them call this together.
    """
    if ranks == 1:
        return dict(mine)
    first = next(iter(mine.values()))
    counts = torch.zeros(ranks, dtype=torch.int64, device=first.device)
    counts[dist.get_rank()] = len(first)
    dist.all_reduce(counts)
    sizes = counts.tolist()
    found: dict[str, Tensor] = {}
    for name, rows in mine.items():
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        everyone = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(everyone, padded)
        found[name] = torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)])
    return found
