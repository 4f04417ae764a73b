"""The control group that counts this process's memory: the job's step under Slurm, a container, a login session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """This process's control group for memory, and those that it is part of."""

    version: int
    """1 or 2: their files have other names."""
    folders: tuple[Path, ...]
    """Its own first; in a container, which may not see its path, folders that aren't there. The last is the top."""


def of_memory(membership: Path = MEMBERSHIP, cgroups: Path = CGROUPS) -> Groups | None:
    """This process's groups; None where they can't be read.

    Source: the kernel's cgroup-v2.rst and cgroup-v1/memory.rst, cgroups(7).

    Args:
        membership: the groups of this process, as in /proc/self/cgroup.
        cgroups: where control groups are mounted.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    if "memory" in paths:
        top, path, version = cgroups / "memory", paths["memory"], 1
    elif "" in paths:
        top, path, version = cgroups, paths[""], 2
    else:
        return None
    own = top / path.strip("/")
    above = [folder for folder in own.parents if folder.is_relative_to(top)]
    return Groups(version=version, folders=(own, *above))
