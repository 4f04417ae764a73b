"""Memory that this process may still have: the machine's, or its control group's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpcdl.plan.cgroups import Groups, of_memory

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


def memory(proc: str = "/proc", groups: Groups | None = None) -> Memory:
    """The machine's, or that of this process's control group, whichever is scarcer.

    Args:
        proc: where /proc is.
        groups: this process's; None: not known, and nothing but the machine bounds it.
    """
    machine = _sizes(f"{proc}/meminfo")
    total, unused = machine.get("MemTotal:"), machine.get("MemAvailable:")
    limit = None if total is None else total * 1024
    available = None if unused is None else unused * 1024
    for folder in groups.folders if groups else ():
        own, left = _of_group(folder, groups.version if groups else 2)
        if own is None or left is None or (limit is not None and own >= limit):
            continue  # `max`, or a number that no machine has: no limit
        limit = own
        available = left if available is None else min(available, left)
    return Memory(available_bytes=available, limit_bytes=limit)


def here() -> Memory:
    """What this process, and those that it starts, may have."""
    return memory(groups=of_memory())


def _of_group(folder: Path, version: int) -> tuple[int | None, int | None]:
    """A group's limit, and what it has left of it."""
    limit, used = (_read(f"{folder}/{names[version]}").strip() for names in (_LIMIT, _USED))
    if not limit.isdigit() or not used.isdigit():
        return None, None
    cached = _sizes(f"{folder}/memory.stat")
    back = sum(cached.get(name, 0) for name in _GIVEN_BACK[version])
    return int(limit), max(0, int(limit) - int(used) + back)


def _sizes(path: str) -> dict[str, int]:
    """Names and numbers of a file with a pair a line."""
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdigit()}


def _read(path: str) -> str:
    """The file's text; empty where there is none."""
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
