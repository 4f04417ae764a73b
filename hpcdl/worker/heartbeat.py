"""This rank's sign of life for its node's agent, and its answer to the question where it is."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpcdl.runs import beats
from hpcdl.worker import growth
from hpcdl.worker.process import Process


class Progress:
    """How far this rank has come; the loop keeps it up to date.

    Args:
        heart: where signs of life go; by default nobody listens.
        watched: who looks at this process's memory when the agent asks; by default nobody.
    """

    def __init__(self, heart: beats.Heart | None = None, watched: growth.Watched | None = None) -> None:
        self._heart = heart or beats.Heart(None, 0, 0)
        self._watched = watched or growth.Watched()

    @property
    def step(self) -> int:
        """Steps done."""
        return self._heart.step

    def begin(self, step: int) -> None:
        """Where this try goes on from."""
        self._heart.say(step=step)

    def reach(self, step: int) -> None:
        """A step is done, and it was one like the others."""
        self._heart.say("step", step)
        self._watched.at(step)

    def end(self) -> None:
        """The last step is done."""
        self._heart.say("end")

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What is no step takes a time of its own: `evaluation`, `checkpoint`."""
        before = self._heart.say(phase)
        try:
            yield
        finally:
            self._heart.say(before)


def start(who: Process) -> Progress:
    """Begins to give signs, where an agent listens; from now on SIGUSR1 dumps all threads' stacks for it.

    faulthandler writes from the signal's handler itself: also where the main thread waits in a library's C code.
    """
    place = os.environ.get(beats.FOLDER)
    if not place:
        return Progress()
    folder = Path(place)
    try:
        stacks = beats.stacks_file(folder, who.rank).open("a")  # open as long as the process lives
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        _OPEN.append(stacks)
        return Progress(beats.Heart(folder, who.rank, who.restart), growth.Watched(folder))
    except OSError as error:  # the node's own disk: training can do without
        print(
            f"{who.node}: rank {who.rank}: no signs of life, so a hang will not be seen: {error}", flush=True
        )
        return Progress()


_OPEN: list[object] = []
"""faulthandler keeps the descriptor's number only."""
