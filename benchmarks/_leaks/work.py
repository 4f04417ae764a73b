"""What the cases are made of: a loop, memory that is really touched, a worker process as a DataLoader's."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpcdl.runs import beats
from hpcdl.worker import growth

KIB, MIB = 1 << 10, 1 << 20
STEPS = 2000
RATES: dict[str, float] = {}
"""Bytes a step of the cases that leak, as they are meant."""


def fill(size: int) -> bytearray:
    """Bytes whose pages are there: zeros alone may be lent by the kernel."""
    return bytearray(b"\1") * size


class Loop:
    """A rank's loop, with signs of life for whoever watches."""

    def __init__(self, folder: Path, pace_s: float) -> None:
        self.step = 0
        self._heart = beats.Heart(folder, 0, 0)
        self._watched = growth.Watched(folder)
        self._pace_s = pace_s

    def run(self, steps: int, work: Iterator[None]) -> None:
        for self.step in range(1, steps + 1):
            began = time.monotonic()
            next(work)
            self._heart.say("step", self.step)
            self._watched.at(self.step)
            time.sleep(max(0.0, began + self._pace_s - time.monotonic()))
        self._heart.say("end")

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before = self._heart.say(phase)
        yield
        self._heart.say(before)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


Work = Callable[[Loop], Iterator[None]]
"""What a step does, up to its yield."""
Cases = dict[str, Work]


def case(table: Cases, rate: float | None = None) -> Callable[[Work], Work]:
    """Puts a case into a table, by its name.

    Args:
        table: which.
        rate: bytes a step that it leaks; None: it doesn't.
    """

    def put(work: Work) -> Work:
        table[work.__name__] = work
        if rate is not None:
            RATES[work.__name__] = rate
        return work

    return put


class Worker:
    """A process that answers, as a DataLoader's worker does."""

    def __init__(self, serve: Callable[..., Iterator[Any]], *shared: Any) -> None:
        self._pipe, other = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_serve, args=(other, serve, shared), daemon=True)
        self._process.start()

    def ask(self, number: int) -> None:
        self._pipe.send(number)
        self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(10)


def _serve(pipe: Any, serve: Callable[..., Iterator[Any]], shared: tuple[Any, ...]) -> None:
    growth.begin_loader()

    def requests() -> Iterator[int]:
        while (number := pipe.recv()) is not None:
            growth.built()
            yield number

    for answer in serve(requests(), *shared):
        pipe.send(answer)


def worker(serve: Callable[..., Iterator[Any]], *shared: Any) -> Worker:
    """One that is started now."""
    return Worker(serve, *shared)
