"""Memory against steps, a series a process: from the samples of a node, live or from its file."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from hpcdl.monitor.records import NodeSample, ProcessSample
from hpcdl.monitor.trend import Point

MOST = 512
"""Points of a series that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Who:
    """Whose memory it is."""

    memory: Literal["host", "gpu"] = "host"
    role: str = "other"
    """One of hpcdl.monitor.records.ROLES; `gpu` where nobody tells which process holds a GPU's memory."""
    rank: int | None = None
    """Of a rank and of its loader's workers; a GPU's index."""
    pid: int | None = None
    """None: all workers of that rank's loader together, which are others in each epoch."""

    @property
    def words(self) -> str:
        """In a sentence."""
        pid = f" (pid {self.pid})" if self.pid is not None else ""
        if self.role == "rank":
            return f"rank {self.rank}{pid}"
        if self.role == "loader":
            return (
                f"a DataLoader worker{pid} of rank {self.rank}"
                if pid
                else f"rank {self.rank}'s DataLoader workers"
            )
        return f"GPU {self.rank}" if self.role == "gpu" else f"{self.role}{pid}"


class Series:
    """One process's points. Full, it drops every second and takes every second from then on: none is favoured.

    In arrays: an agent with many processes must not itself look as if it leaked.
    """

    def __init__(self) -> None:
        self._steps, self._times, self._sizes, self._counts = (array("d") for _ in range(4))
        self.seen = 0
        """Samples, also those that were dropped."""
        self._every = 1

    def add(self, step: float, time_s: float, size: float, count: int = 1) -> None:
        """One more sample.

        Args:
            step: that the rank has done.
            time_s: when, in seconds since the epoch.
            size: in bytes.
            count: how many processes it is of.
        """
        if self.seen % self._every == 0:
            for column, value in zip(self._columns, (step, time_s, size, count), strict=True):
                column.append(value)
            if len(self._steps) > MOST:
                for column in self._columns:
                    del column[1::2]
                self._every *= 2
        self.seen += 1

    @property
    def _columns(self) -> tuple[array[float], ...]:
        return self._steps, self._times, self._sizes, self._counts

    @property
    def points(self) -> list[Point]:
        """Those of as many processes as there mostly were: between two epochs some are missing."""
        usual = max(Counter(self._counts).items(), key=lambda each: each[1], default=(1.0, 0))[0]
        rows = zip(self._steps, self._sizes, self._counts, strict=True)
        return [(step, size) for step, size, count in rows if count == usual]

    @property
    def last_step(self) -> float:
        """The last sample's."""
        return self._steps[-1] if self._steps else 0.0

    @property
    def step_s(self) -> float | None:
        """Seconds a step, lately; pauses between steps included."""
        middle = len(self._steps) // 2
        if not self._steps or self._steps[-1] <= self._steps[middle]:
            return None
        return (self._times[-1] - self._times[middle]) / (self._steps[-1] - self._steps[middle])


class Gathered:
    """Every process's series on one node in one try."""

    def __init__(self) -> None:
        self.series: dict[Who, Series] = {}
        self._there: set[Who] = set()

    def take(self, sample: NodeSample) -> None:
        """One more sample. What is no step (evaluation, checkpoint, the start) has memory of its own: left out."""
        ranks = {each.rank: each for each in sample.ranks}
        first = next(iter(ranks.values()), None)
        when = seconds(sample.time)
        loaders: dict[int | None, list[float]] = {}
        there: set[Who] = set()
        for each in sample.processes:
            beat = ranks.get(each.rank, first)
            is_loader = each.role == "loader"
            who = Who(role=each.role, rank=each.rank, pid=each.pid)
            there |= {who, Who(memory="gpu", role=each.role, rank=each.rank, pid=each.pid)}
            if beat is None or not beat.step or beat.phase not in (None, "step"):
                continue
            if (size := _host_bytes(each)) is not None:
                self._add(who, beat.step, when, size)
                if is_loader:
                    loaders.setdefault(each.rank, []).append(size)
            if each.gpu_memory_bytes:
                self._add(
                    Who(memory="gpu", role=each.role, rank=each.rank, pid=each.pid),
                    beat.step,
                    when,
                    each.gpu_memory_bytes,
                )
        for rank, sizes in loaders.items():
            beat = ranks.get(rank, first)
            assert beat is not None and beat.step
            self._add(Who(role="loader", rank=rank), beat.step, when, sum(sizes), len(sizes))
        self._gpus(sample, first, when)
        self._there = there

    def take_out_ended(self) -> dict[Who, Series]:
        """The series of processes that were not there at the last sample: they are not kept any longer."""
        ended = [who for who in self.series if who.pid is not None and who not in self._there]
        return {who: self.series.pop(who) for who in ended}

    def forget(self, who: Who) -> None:
        """Begins a process's series anew."""
        self.series[who] = Series()

    def _gpus(self, sample: NodeSample, first: ProcessSample | None, when: float) -> None:
        """Where the driver doesn't say which process holds what."""
        if first is None or not first.step or first.phase not in (None, "step"):
            return
        if any(each.gpu_memory_bytes for each in sample.processes):
            return
        for gpu in sample.gpus:
            if gpu.memory_used_bytes is not None:
                self._add(
                    Who(memory="gpu", role="gpu", rank=gpu.index), first.step, when, gpu.memory_used_bytes
                )

    def _add(self, who: Who, step: float, when: float, size: float, count: int = 1) -> None:
        self.series.setdefault(who, Series()).add(step, when, size, count)

    def judged(self) -> Iterator[tuple[Who, Series]]:
        """Those that a verdict is wanted of: loaders' workers only together, since others come in each epoch."""
        for who, series in self.series.items():
            if who.role != "loader" or who.pid is None or who.memory == "gpu":
                yield who, series

    def of_loaders(self, rank: int | None) -> dict[Who, Series]:
        """The workers of a rank's loader, one by one."""
        return {
            who: series
            for who, series in self.series.items()
            if who.role == "loader" and who.rank == rank and who.pid is not None and who.memory == "host"
        }


def _host_bytes(each: ProcessSample) -> float | None:
    return None if each.rss_bytes is None else float(each.rss_bytes - (each.file_bytes or 0))


def seconds(time: str) -> float:
    """A sample's time since the epoch; 0 where it can't be read."""
    try:
        return datetime.fromisoformat(time).timestamp()
    except ValueError:
        return 0.0
