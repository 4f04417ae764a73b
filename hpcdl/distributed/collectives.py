"""Many tensors in few collectives."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 64 * 2**20
"""How much is averaged at a time, where nobody says otherwise."""


def average(tensors: Iterable[Tensor], group: dist.ProcessGroup, bucket_bytes: int = BUCKET_BYTES) -> None:
    """Sets tensors to their mean over a group's ranks, in place; the same to the last bit on each.

    Args:
        tensors: the same, in the same order, on every rank.
        group: whose mean is taken.
        bucket_bytes: how much goes into one collective.
    """
    under_way: deque[tuple[list[Tensor], Tensor, Any]] = deque()
    for bucket in buckets(tensors, bucket_bytes):
        flat = torch.cat([tensor.flatten() for tensor in bucket]).div_(group.size())
        under_way.append((bucket, flat, dist.all_reduce(flat, group=group, async_op=True)))
        if len(under_way) > 1:  # one is on its way while the next is put together: no more copies than two
            _arrived(*under_way.popleft())
    for rest in under_way:
        _arrived(*rest)


def _arrived(bucket: list[Tensor], flat: Tensor, work: Any) -> None:
    work.wait()
    parts = torch.split(flat, [tensor.numel() for tensor in bucket])
    means = [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)]
    torch._foreach_copy_(bucket, means)


def buckets(tensors: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype, together no more than `size` bytes unless one alone is."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(each.nbytes for each in bucket) + tensor.nbytes > size
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
