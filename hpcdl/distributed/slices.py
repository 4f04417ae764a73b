"""The output head and its cross-entropy, a slice of the vocabulary at a time.

The log of the summed exponentials is put together from the slices' (as Megatron-LM does over ranks; Shoeybi et
al., 2019, section 3). With it at hand every slice's gradient is whole by itself, over all tokens of the step, so
that these rows can be updated and let go: neither the head nor its gradient is ever there at once. What it
costs is that logits are computed a second time on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hpcdl.distributed.residence import Residence
from hpcdl.spec.streaming import CHUNK_LOGITS, SLICE

Rows = Callable[[int, int, Tensor], None]
"""Is given the first row, the one after the last, and their gradient in fp32, its own from now on."""


class SlicedHead:
    """logits = states @ weight.T, and the summed cross-entropy of them."""

    def __init__(self, residence: Residence, weight: Tensor) -> None:
        """Takes the head.

        Args:
            residence: where it comes from.
            weight: `(vocabulary, width)` on the shelf.
        """
        self._residence = residence
        self._weight = weight

    def slices(self) -> Iterator[tuple[int, int]]:
        """First row and the one after the last of each slice."""
        rows, width = self._weight.shape
        step = max(1, SLICE // width)
        return ((first, min(first + step, rows)) for first in range(0, rows, step))

    def loss(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy, and what the way back needs to know.

        Args:
            states: `(tokens, width)` in the dtype of the products.
            labels: `(tokens,)`, none ignored.

        Returns:
            The sum, an fp64 scalar; the log of each token's summed exponentials, `(tokens, 1)` fp32.
        """
        norm = states.new_full((len(labels), 1), float("-inf"), dtype=torch.float32)
        aim = torch.zeros_like(norm)
        for first, last in self.slices():
            matrix = self._matrix(first, last, states.dtype)
            for part in _chunks(len(labels), last - first):
                logits = (states[part] @ matrix.T).float()
                norm[part] = torch.logaddexp(norm[part], logits.logsumexp(-1, keepdim=True))
                target, here = _targets(labels[part], first, last)
                aim[part] += logits.gather(1, target) * here
            self._residence.shelf.release(self._weight[first:last])
        return (norm - aim).sum(dtype=torch.float64), norm

    def gradient(
        self, states: Tensor, labels: Tensor, norm: Tensor, rows: Rows | None, *, to_states: bool = True
    ) -> Tensor | None:
        """Gradients of the sum.

        Args:
            states: as for `loss`.
            labels: as for `loss`.
            norm: what it gave.
            rows: is given each slice's gradient; None where the head's isn't wanted.
            to_states: whether the gradient of `states` is.

        Returns:
            It, in fp32, `(tokens, width)`.
        """
        back = torch.zeros_like(states, dtype=torch.float32) if to_states else None
        for first, last in self.slices():
            matrix = self._matrix(first, last, states.dtype)
            own = matrix.new_zeros(matrix.shape, dtype=torch.float32) if rows else None
            for part in _chunks(len(labels), last - first):
                # d loss / d logits = softmax - one-hot
                delta = (states[part] @ matrix.T).float().sub_(norm[part]).exp_()
                target, here = _targets(labels[part], first, last)
                delta.scatter_add_(1, target, -here.to(delta.dtype))
                delta = delta.to(states.dtype)
                if back is not None:
                    _add_product(back[part], delta, matrix)
                if own is not None:
                    _add_product(own, delta.T, states[part])
            del matrix
            if rows and own is not None:
                rows(first, last, own)
            self._residence.shelf.release(self._weight[first:last])
        return back

    def _matrix(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self._residence.here(self._weight[first:last]).to(dtype)


def _chunks(tokens: int, rows: int) -> Iterator[slice]:
    step = max(64, CHUNK_LOGITS // rows)
    return (slice(at, at + step) for at in range(0, tokens, step))


def _targets(labels: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Each token's place within the slice, `(tokens, 1)`, and whether it is there."""
    target = labels[:, None] - first
    here = (target >= 0) & (target < last - first)
    return target.clamp(0, last - first - 1), here


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds a product: total += left @ right; total in fp32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
