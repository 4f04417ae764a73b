"""(seed, epoch, global sample index) → rows → tensors, whatever the number of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcdl.distributed.losses import IGNORE
from hpcdl.worker.data.pack import START, TARGET
from hpcdl.worker.data.prepare import Rows

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


class Order:
    """The order in which samples are read: each epoch is a permutation of its own, drawn from the seed."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        self._epoch = -1
        self._permutation: NDArray[np.int64]

    def rows(self, first: int, count: int) -> NDArray[np.int64]:
        """Rows of the global samples `first … first + count - 1`, `(count,)`; epochs follow one another."""
        import numpy as np

        return np.array([self._row(index) for index in range(first, first + count)], np.int64)

    def _row(self, sample: int) -> int:
        import numpy as np

        epoch, place = divmod(sample, self._size)
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self._seed, epoch]).permutation(self._size)
            self._epoch = epoch
        return int(self._permutation[place])


def share(rows: NDArray[np.int64], rank: int, ranks: int) -> NDArray[np.int64]:
    """This rank's contiguous share of a global batch, `(len(rows) / ranks,)`."""
    size, rest = divmod(len(rows), ranks)
    assert rest == 0, "the global batch divides by the ranks: checked before submission"
    return rows[rank * size : (rank + 1) * size]


def batch(part: Rows, rows: NDArray[np.int64], device: torch.device) -> dict[str, torch.Tensor]:
    """Rows as the model takes them.

    `position_ids` begin anew with each document: transformers builds a block-diagonal mask from that, so
    no token attends to another document.

    Returns:
        `input_ids`, `position_ids`, `labels`, each `(rows, seq_len)`, int64. `labels[i]` is the token
        after `input_ids[i]` (already shifted), or IGNORE.
    """
    import numpy as np
    import torch

    tokens = part.tokens[rows].astype(np.int64)
    flags = part.flags[rows]
    labels = np.where(flags[:, 1:] & TARGET, tokens[:, 1:], IGNORE)
    place = np.arange(tokens.shape[1] - 1)
    begins = np.where(flags[:, :-1] & START, place, 0)
    positions = place - np.maximum.accumulate(begins, axis=1)
    arrays = {"input_ids": tokens[:, :-1], "position_ids": positions, "labels": labels}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    if device.type == "cuda":
        return {name: t.pin_memory().to(device, non_blocking=True) for name, t in tensors.items()}
    return tensors
