"""A node's cores and memory: how busy all of it is, and what memory this job has left there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpcdl.plan.cgroups import CGROUPS, MEMBERSHIP, Groups, of_memory
from hpcdl.monitor.processes import read

_LIMIT = {1: "memory.limit_in_bytes", 2: "memory.max"}
_USED = {1: "memory.usage_in_bytes", 2: "memory.current"}
_GIVEN_BACK = {
    1: ("total_inactive_file", "total_active_file"),
    2: ("inactive_file", "active_file", "slab_reclaimable"),
}
"""Of a group's memory what the kernel takes back before it kills: cached files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What there is, and what is left."""

    available_bytes: int | None = None
    limit_bytes: int | None = None

    @property
    def share_left(self) -> float:
        """Of the limit; 1 where it isn't known."""
        if self.available_bytes is None or not self.limit_bytes:
            return 1.0
        return self.available_bytes / self.limit_bytes


class Node:
    """One node, as its agent sees it.

    Args:
        proc: where /proc is.
        membership: this process's control groups.
        cgroups: where control groups are mounted.
    """

    def __init__(self, proc: str = "/proc", membership: Path = MEMBERSHIP, cgroups: Path = CGROUPS) -> None:
        self._proc = proc
        self._groups: Groups | None = of_memory(membership, cgroups)
        self._before = self._ticks()

    def cpu_percent(self) -> float | None:
        """Of all cores, since the call before; None where none of them has counted a tick since."""
        before, self._before = self._before, self._ticks()
        idle, whole = (now - then for now, then in zip(self._before, before, strict=True))
        return round(100 * (1 - idle / whole), 1) if whole > 0 else None

    def memory(self) -> Memory:
        """The machine's, or that of the job's control group, whichever is scarcer."""
        machine = _sizes(f"{self._proc}/meminfo")
        total, free = machine.get("MemTotal:"), machine.get("MemAvailable:")
        limit = None if total is None else total * 1024
        available = None if free is None else free * 1024
        for folder in self._groups.folders if self._groups else ():
            own, left = self._of_group(folder)
            if own is None or left is None or (limit is not None and own >= limit):
                continue  # `max`, or a number that no machine has: no limit
            limit = own
            available = left if available is None else min(available, left)
        return Memory(available_bytes=available, limit_bytes=limit)

    def _of_group(self, folder: Path) -> tuple[int | None, int | None]:
        """A group's limit, and what it has left of it."""
        assert self._groups is not None
        version = self._groups.version
        limit, used = (read(f"{folder}/{names[version]}").strip() for names in (_LIMIT, _USED))
        if not limit.isdigit() or not used.isdigit():
            return None, None
        cached = _sizes(f"{folder}/memory.stat")
        back = sum(cached.get(name, 0) for name in _GIVEN_BACK[version])
        return int(limit), max(0, int(limit) - int(used) + back)

    def _ticks(self) -> tuple[int, int]:
        """CPU time so far, over all cores: idle, and all of it. Waiting for a disk is idle."""
        fields = [int(word) for word in read(f"{self._proc}/stat").partition(b"\n")[0].split()[1:9]]
        return (fields[3] + fields[4], sum(fields)) if len(fields) == 8 else (0, 0)


def _sizes(path: str) -> dict[str, int]:
    """Names and numbers of a file with a pair a line."""
    pairs = (line.split() for line in read(path).decode(errors="replace").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdigit()}
