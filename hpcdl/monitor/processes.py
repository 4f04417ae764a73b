"""The processes below a node's agent, read from /proc: who they are, what they hold, what they use.

psutil does the same ten times as slowly: it opens more files a process, and looks at every process of the machine.
A process may be gone between two reads, and another user's can't be read: what isn't known is None, and no error.
Source: proc(5).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hpcdl.monitor.records import ProcessSample
from hpcdl.runs import beats
from hpcdl.runs.beats import Beat

_TICKS = os.sysconf("SC_CLK_TCK")
_RESIDENT, _OF_FILES = re.compile(rb"\nVmRSS:\s+(\d+) kB"), re.compile(rb"\nRssFile:\s+(\d+) kB")
_FORGET_S = 60.0
"""How long a process that is no part of the run isn't looked at again: its number may be another's by then."""
_SHORTEST_S = 0.05
"""A time in which CPU ticks (of 10 ms) say something."""
_ORDER = ("rank", "loader", "torchrun", "agent", "other")
"""Ranks first: what only they have then ends a table's column early."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """What /proc/PID/stat says of a process."""

    pid: int
    parent: int
    state: str
    """`Z`: it has ended, and nobody has asked how."""
    started: int
    """Clock ticks since the machine began; with the pid it names a process."""
    ticks: int
    """Of CPU time, in user and kernel mode."""
    threads: int

    @property
    def key(self) -> tuple[int, int]:
        """Its name: a pid alone may be used again."""
        return self.pid, self.started


def read(path: str) -> bytes:
    """A file of /proc; empty where it can't be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        blocks = []
        while block := os.read(descriptor, 1 << 16):
            blocks.append(block)
        return b"".join(blocks)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def stat(proc: str, pid: int) -> Stat | None:
    """A process's; None where it is gone, or not for us to see."""
    fields = read(f"{proc}/{pid}/stat").rpartition(b")")[2].split()
    if len(fields) < 20:
        return None
    return Stat(
        pid=pid,
        parent=int(fields[1]),
        state=fields[0].decode(),
        started=int(fields[19]),
        ticks=int(fields[11]) + int(fields[12]),
        threads=int(fields[17]),
    )


class Tree:
    """A process and all below it.

    Args:
        root: the topmost.
        proc: where /proc is.
    """

    def __init__(self, root: int, proc: str = "/proc") -> None:
        self._root, self._proc = root, proc
        self._foreign: set[int] = set()
        self._forget_at = 0.0

    def look(self) -> dict[int, Stat]:
        """Those that are there, by pid, parents before their children; none that has ended.

        Raises:
            OSError: /proc can't be listed.
        """
        if time.monotonic() >= self._forget_at:
            self._foreign = set()
            self._forget_at = time.monotonic() + _FORGET_S
        numbers = [int(name) for name in os.listdir(self._proc) if name.isdigit()]  # noqa: PTH208 quicker
        self._foreign.intersection_update(numbers)
        found = {
            pid: each
            for pid in numbers
            if pid not in self._foreign and (each := stat(self._proc, pid)) is not None
        }
        below: dict[int, list[Stat]] = {}
        for each in found.values():
            below.setdefault(each.parent, []).append(each)
        mine: dict[int, Stat] = {}
        level = [found[self._root]] if self._root in found else []
        while level:
            mine.update((each.pid, each) for each in level)
            level = [child for each in level for child in below.get(each.pid, ())]
        self._foreign.update(pid for pid in found if pid not in mine and self._is_foreign(pid, found))
        return {pid: each for pid, each in mine.items() if each.state not in "ZX"}

    def _is_foreign(self, pid: int, found: Mapping[int, Stat]) -> bool:
        """Whether its ancestors are known up to one that is no part of the run; else it is looked at again."""
        seen = set()
        while pid in found and pid not in self._foreign and pid not in seen:
            seen.add(pid)
            pid = found[pid].parent
        return pid == 0 or pid in self._foreign


@dataclass(frozen=True, slots=True, kw_only=True)
class _Who:
    """What a process is."""

    role: str = "other"
    rank: int | None = None


class Processes:
    """Samples of an agent's processes.

    Args:
        torchrun: its process id.
        signs: the folder of the ranks' signs of life.
        agent: its process id.
        proc: where /proc is.
    """

    def __init__(self, torchrun: int, signs: Path, agent: int | None = None, proc: str = "/proc") -> None:
        self._agent = os.getpid() if agent is None else agent
        self._torchrun, self._signs, self._proc = torchrun, signs, proc
        self._tree = Tree(self._agent, proc)
        self._known: dict[tuple[int, int], _Who] = {}
        self._before: dict[tuple[int, int], tuple[int, float]] = {}
        """CPU ticks, and when they were read."""

    def sample(self, gpu_memory: Mapping[int, int] | None = None) -> list[ProcessSample]:
        """Every process of the run on this node, ranks first.

        Args:
            gpu_memory: bytes that processes hold on GPUs.

        Raises:
            OSError: /proc can't be listed.
        """
        said = {beat.pid: beat for beat in beats.listen(self._signs)}
        found = self._tree.look()
        who: dict[int, _Who] = {}
        for each in found.values():
            who[each.pid] = self._who(each, who.get(each.parent), said)
        self._known = {each.key: who[each.pid] for each in found.values()}
        before, self._before = self._before, {}
        samples = [
            self._of(each, who[each.pid], said.get(each.pid), before.get(each.key), gpu_memory or {})
            for each in found.values()
        ]
        order = {role: number for number, role in enumerate(_ORDER)}
        return sorted(samples, key=lambda one: (order[one.role], -1 if one.rank is None else one.rank))

    def _who(self, each: Stat, above: _Who | None, said: Mapping[int, Beat]) -> _Who:
        if each.pid == self._agent:
            return _Who(role="agent")
        if each.pid == self._torchrun:
            return _Who(role="torchrun")
        if above is not None and above.role in ("rank", "loader"):
            return replace(above, role="loader")
        known = self._known.get(each.key, _Who())
        if above is not None and above.role == "torchrun":
            rank = said[each.pid].rank if each.pid in said else known.rank
            rank = self._told_rank(each.pid) if rank is None else rank
            return _Who() if rank is None else _Who(role="rank", rank=rank)
        return replace(known, role="other")  # its parent is dead: it is the agent's now

    def _told_rank(self, pid: int) -> int | None:
        """What torchrun has told a worker that has given no sign yet."""
        for pair in read(f"{self._proc}/{pid}/environ").split(b"\0"):
            if pair.startswith(b"RANK=") and pair[5:].isdigit():
                return int(pair[5:])
        return None

    def _of(
        self,
        each: Stat,
        who: _Who,
        beat: Beat | None,
        before: tuple[int, float] | None,
        gpu_memory: Mapping[int, int],
    ) -> ProcessSample:
        is_rank = who.role == "rank" and beat is not None
        came, went = self._moved(each.pid)
        resident, of_files = self._memory(each.pid)
        return ProcessSample(
            pid=each.pid,
            role=who.role,
            rank=who.rank,
            step=beat.step if is_rank and beat else None,
            phase=beat.phase if is_rank and beat else None,
            rss_bytes=resident,
            file_bytes=of_files,
            cpu_percent=self._cpu(each, before),
            threads=each.threads,
            open_files=self._open_files(each.pid),
            read_bytes=came,
            written_bytes=went,
            gpu_memory_bytes=gpu_memory.get(each.pid),
        )

    def _cpu(self, each: Stat, before: tuple[int, float] | None) -> float | None:
        """Percent of a core since the sample before; since it began, where there was none."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        ticks, then = before or (0, each.started / _TICKS)
        self._before[each.key] = (each.ticks, now)
        if now - then < _SHORTEST_S:
            return None
        return round(100 * (each.ticks - ticks) / _TICKS / (now - then), 1)

    def _memory(self, pid: int) -> tuple[int | None, int | None]:
        """Resident bytes, and of these the pages of mapped files."""
        text = read(f"{self._proc}/{pid}/status")
        found = _RESIDENT.search(text)
        files = _OF_FILES.search(text)
        return int(found[1]) * 1024 if found else None, int(files[1]) * 1024 if files else None

    def _open_files(self, pid: int) -> int | None:
        folder = f"{self._proc}/{pid}/fd"
        try:
            # Since Linux 6.2 the folder's size; 0 before.
            return os.stat(folder).st_size or len(os.listdir(folder))  # noqa: PTH116, PTH208 quicker
        except OSError:
            return None

    def _moved(self, pid: int) -> tuple[int | None, int | None]:
        """Bytes read from disks and written to them."""
        values = dict(line.split(b": ") for line in read(f"{self._proc}/{pid}/io").splitlines())
        came, went = values.get(b"read_bytes"), values.get(b"write_bytes")
        return None if came is None else int(came), None if went is None else int(went)


def pss_bytes(pid: int, proc: str = "/proc") -> int | None:
    """A process's resident memory, pages that it shares counted in part; None where it can't be read.

    The kernel walks the process's page table for it, holding what the process needs to map memory: about 10 ms a GiB.
    """
    for line in read(f"{proc}/{pid}/smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return None
