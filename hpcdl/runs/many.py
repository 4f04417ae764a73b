"""The same small reads in thousands of run directories: on a slow shared disk they wait together, not in turn."""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

PROBE = 32
"""Items after which it is known how slow the disk is."""
SLOW_S = 2e-4
"""Seconds an item waits, on average, from which threads are worth their turns: a file in memory takes 2e-5."""
THREADS = 16
_WHO: int = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)


def _sleeps() -> int:
    """How often this thread has given its processor away to wait for something."""
    return resource.getrusage(_WHO).ru_nvcsw


def each(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`work` of every item, in the items' order.

    Args:
        work: reads files; called from several threads where the first items show that the disk is slow.
        items: what of.
    """
    left = iter(items)
    begun, worked, slept = time.perf_counter(), time.thread_time(), _sleeps()
    probe = [work(item) for item in itertools.islice(left, PROBE)]
    waited = (time.perf_counter() - begun) - (time.thread_time() - worked)
    asleep = _sleeps() - slept >= PROBE // 2  # else it waited for a processor, which threads would, too
    yield from probe
    if waited / PROBE < SLOW_S or not asleep:
        yield from map(work, left)
        return
    from concurrent.futures import ThreadPoolExecutor

    batches = iter(lambda: list(itertools.islice(left, PROBE)), [])
    with ThreadPoolExecutor(THREADS) as pool:
        for results in pool.map(lambda batch: [work(item) for item in batch], batches):
            yield from results
