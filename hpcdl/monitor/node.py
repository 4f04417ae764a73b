"""A node's cores, and what memory this job has left there."""

from __future__ import annotations

from pathlib import Path

from hpcdl.monitor.processes import read
from hpcdl.plan import free
from hpcdl.plan.cgroups import CGROUPS, MEMBERSHIP, Groups, of_memory
from hpcdl.plan.free import Memory


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
        return free.memory(self._proc, self._groups)

    def _ticks(self) -> tuple[int, int]:
        """CPU time so far, over all cores: idle, and all of it. Waiting for a disk is idle."""
        fields = [int(word) for word in read(f"{self._proc}/stat").partition(b"\n")[0].split()[1:9]]
        return (fields[3] + fields[4], sum(fields)) if len(fields) == 8 else (0, 0)
