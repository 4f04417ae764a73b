"""A process looks at its own memory, on its agent's request: which lines and tensors grow from step to step.

Nothing of it runs before the agent asks, but a look at one byte a step. Then for some steps: tracemalloc with a few
frames, the living tensors (through the garbage collector), on a GPU torch's record of allocations with their stacks,
and at each step what malloc has in use and holds free. What grows between three points of that time is told; then all
of it ends. tracemalloc slows what allocates many Python objects to about half its speed while it goes on.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import tracemalloc
from array import array
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from hpcdl.monitor import looking
from hpcdl.monitor.looking import Answer, Growing
from hpcdl.monitor.trend import theil_sen
from hpcdl.runs import beats
from hpcdl.worker import alive

_FRAMES = 12
"""Enough to come from a package's inside to the line of one's own that called it."""
_LONGEST_S = 120.0
_SHOWN = 6
_REPLACED = 0.2
"""Share of what was traced that has stayed, below which it has taken the place of older things."""
_SMALL = 512
"""Bytes of an object up to which Python takes it from its own blocks, not from malloc."""
_LEAST = 0.01
"""Share of the largest below which a line is not named."""


class Watched:
    """This process, as one that may be asked; by default nobody asks.

    Args:
        folder: the agent's.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._look: _Look | None = None
        self._ear: looking.Ear | None = None
        self._step = 0
        if folder is not None:
            with contextlib.suppress(OSError):  # the node's own disk is full: training can do without
                self._ear = looking.Ear(folder, os.getpid())

    def at(self, step: int) -> None:
        """Between two steps: goes on with a look, or begins one if it was asked for."""
        if self._look is not None:
            self._go_on(self._look, step)
        elif self._ear is not None and (steps := self._ear.asked()):
            with contextlib.suppress(Exception):
                self._look = _Look(step, steps)

    def next(self) -> None:
        """The same, for a process that counts its steps by these calls."""
        self._step += 1
        self.at(self._step)

    def _go_on(self, look: _Look, step: int) -> None:
        try:
            answer = look.at(step)
        except Exception as error:  # of a library that it looks into; training goes on
            look.close()
            answer = look.failed(step, f"{type(error).__name__}: {error}")
        if answer is not None and self._folder is not None:
            self._look = None
            with contextlib.suppress(OSError):
                looking.write(self._folder, answer)


_loader = Watched()


def begin_loader() -> None:
    """This is a DataLoader's worker: from now on it may be asked."""
    global _loader
    folder = os.environ.get(beats.FOLDER)
    _loader = Watched(Path(folder) if folder else None)


def built() -> None:
    """A loader's worker has built one more micro-batch; nothing in another process."""
    _loader.next()


class _Look:
    """One look, from the first step on."""

    def __init__(self, step: int, steps: int) -> None:
        self._first, self._steps = step, max(8, steps)
        self._began = self._took_from = time.perf_counter()
        self._took = 0.0
        self._rows = 0
        # Room for all numbers at once: what is appended would itself be seen to grow.
        self._numbers = {name: array("d", [0.0]) * (self._steps + 1) for name in ("step", *alive.NUMBERS)}
        self._own_trace = not tracemalloc.is_tracing()
        if self._own_trace:
            tracemalloc.start(_FRAMES)
        self._cuda = alive.Cuda()
        self._points: list[_Point] = []
        self._due = [step + self._steps // 4, step + self._steps * 5 // 8, step + self._steps]
        self._pause()

    def at(self, step: int) -> Answer | None:
        """Takes this step's numbers; the answer after the last one."""
        self._took_from = time.perf_counter()
        late = self._took_from - self._began > _LONGEST_S
        if self._rows <= self._steps:
            self._numbers["step"][self._rows] = step
            for name, value in zip(alive.NUMBERS, alive.numbers(), strict=True):
                self._numbers[name][self._rows] = value
            self._rows += 1
        if late or (self._due and step >= self._due[0]):
            self._due = [each for each in self._due if each > step]
            self._points.append(_Point(step, self._cuda, self._points[-1] if self._points else None))
        if self._due and not late:
            self._pause()
            return None
        self.close()
        rates = self._rates()
        found = self._growing(rates)
        self._pause()
        return Answer(
            pid=os.getpid(), first_step=self._first, last_step=step, took_s=round(self._took, 3),
            growing=tuple(found),
            resident=rates["resident"], python=rates["python"], malloc_used=rates["malloc_used"],
            malloc_free=rates["malloc_free"], cuda_allocated=rates["cuda_allocated"],
            cuda_reserved=rates["cuda_reserved"],
        )  # fmt: skip

    def failed(self, step: int, why: str) -> Answer:
        """The answer where a look into a library has failed."""
        return Answer(pid=os.getpid(), first_step=self._first, last_step=step, took_s=self._took, note=why)

    def close(self) -> None:
        """Ends all that was begun."""
        with contextlib.suppress(Exception):
            self._cuda.close()
        if self._own_trace:
            tracemalloc.stop()

    def _pause(self) -> None:
        self._took += time.perf_counter() - self._took_from

    def _rates(self) -> dict[str, float | None]:
        """By numbers, robustly; without those that were read before the first point (what tracing begins with)."""
        start = self._rows // 4
        steps = self._numbers["step"][start : self._rows]
        rates: dict[str, float | None] = {}
        for name in alive.NUMBERS:
            values = self._numbers[name][start : self._rows]
            if name != "blocks":
                known = len(values) > 2 and values[0] >= 0
                rates[name] = theil_sen(list(zip(steps, values, strict=True))).slope if known else None
        rates["python"] = self._python()
        return rates

    def _python(self) -> float | None:
        """Python's objects: what was traced, less the share that took the place of older ones."""
        if len(self._points) < 2:
            return None
        first, last = self._points[0], self._points[-1]
        traced = (last.traced - first.traced) / max(1, last.step - first.step)
        return max(0.0, traced) * self._kept()

    def _kept(self) -> float:
        """Share of the traced growth that is no replacement: a full ring's new items are traced, its old ones not."""
        first, last = self._points[0], self._points[-1]
        traced = last.count - first.count
        return min(1.0, max(0.0, (last.blocks - first.blocks) / traced)) if traced > 0 else 0.0

    def _growing(self, rates: Mapping[str, float | None]) -> list[Growing]:
        """What has grown from each point to the next, the largest first."""
        if len(self._points) < 2:
            return []
        last = self._points[-1]
        steps = max(1, last.step - self._points[0].step)
        lines = self._not_replaced(
            _rising([point.lines for point in self._points]), rates["malloc_used"], steps
        )
        tensors = _rising([point.tensors.bytes for point in self._points])
        graphs = _rising([point.tensors.graphs for point in self._points])
        made_at = {key: last.tensors.line[key] or self._line_by_count(key, lines) for key in tensors}
        merged = {key: rise + lines.pop(made_at[key], 0.0) for key, rise in tensors.items()}
        if graphs:  # what the graphs save is C++ memory: all that nothing else explains
            most = max(graphs, key=lambda key: graphs[key])
            in_use = max(rates["malloc_used"] or 0.0, rates["cuda_allocated"] or 0.0) * steps
            rest = in_use - sum(merged.values()) - sum(lines.values())
            merged[most] = merged.get(most, 0.0) + max(0.0, rest)
        found = [(alive.text_of(where), where, rise) for where, rise in lines.items()]
        found += [(last.tensors.kind(key), made_at.get(key, ""), rise) for key, rise in merged.items()]
        on_gpu = _rising([point.cuda for point in self._points])
        found += [(f"GPU memory: {alive.text_of(where)}", where, rise) for where, rise in on_gpu.items()]
        found.sort(key=lambda each: -each[2])
        least = max(_LEAST * found[0][2], 8.0 * steps) if found else 0.0
        return [
            Growing(what=what, where=alive.shown(where), bytes_per_step=round(rise / steps, 1))
            for what, where, rise in found[:_SHOWN]
            if rise >= least
        ]

    def _not_replaced(
        self, lines: dict[str, float], malloc_used: float | None, steps: int
    ) -> dict[str, float]:
        """Without what only takes the place of older things, by what is in use: Python's blocks, malloc's bytes."""
        first, last = self._points[0], self._points[-1]
        large = {
            where: rise
            for where, rise in lines.items()
            if malloc_used is not None and rise > _SMALL * (last.counts[where] - first.counts.get(where, 0.0))
        }
        small = {where: rise for where, rise in lines.items() if where not in large}
        if malloc_used is not None and malloc_used < 0.3 * sum(large.values()) / steps:
            large = {}
        return large | (small if self._kept() >= _REPLACED else {})

    def _line_by_count(self, key: str, lines: Mapping[str, float]) -> str:
        """The line of Python that has made about as many new objects as there are new tensors of a kind."""
        first, last = self._points[0], self._points[-1]
        new = last.tensors.counts[key] - first.tensors.counts.get(key, 0.0)
        made = {where: last.counts[where] - first.counts.get(where, 0.0) for where in lines}
        near = {where: abs(count - new) for where, count in made.items() if new <= count <= 4 * new}
        return min(near, key=lambda where: near[where], default="")


class _Point:
    """What lives at one step."""

    __slots__ = ("blocks", "count", "counts", "cuda", "lines", "own", "step", "tensors", "traced")

    def __init__(self, step: int, cuda: alive.Cuda, before: _Point | None) -> None:
        """Reads all of it; takes up to a second in a large process."""
        blocks = sys.getallocatedblocks()
        own: int = before.own if before else 0
        lines = alive.Lines()
        self.step, self.lines, self.counts = step, lines.bytes, lines.counts
        self.traced, self.count = lines.traced, lines.count
        del lines
        self.tensors, self.cuda = alive.Tensors(), cuda.by_line()
        self.blocks = blocks - own
        """Of Python's memory, less what the points before have taken."""
        self.own: int = own + sys.getallocatedblocks() - blocks


def _rising(points: list[dict[str, float]]) -> dict[str, float]:
    """What each key has risen by from the first point to the last, where it has from each to the next."""
    rises = {}
    for key, last in points[-1].items():
        values = [point.get(key, 0.0) for point in points]
        if all(after > before for before, after in pairwise(values)):
            rises[key] = last - values[0]
    return rises
