"""What the kernel says of memory: has it killed a process of this job because there was none left?"""

from __future__ import annotations

import re
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def kills(membership: Path = MEMBERSHIP, cgroups: Path = CGROUPS) -> int | None:
    """Processes of this process's control group that the kernel has killed for want of memory so far.

    The group is the job's step under Slurm with task/cgroup, a container's in one, else the login session's:
    workers are in their agent's. Source: the kernel's cgroup-v2.rst (memory.events) and cgroup-v1/memory.rst
    (memory.oom_control).

    Args:
        membership: the groups of this process, as in /proc/self/cgroup.
        cgroups: where control groups are mounted.

    Returns:
        The count; None where it can't be read, and nothing can be told.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    groups = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    if "memory" in groups:
        folder, file = cgroups / "memory", "memory.oom_control"
    elif "" in groups:
        folder, file = cgroups, "memory.events"
    else:
        return None
    path = groups.get("memory", groups.get("", "")).strip("/")
    for place in (folder / path / file, folder / file):  # in a container the path may be the host's
        try:
            found = re.search(r"^oom_kill (\d+)$", place.read_text(encoding="utf-8"), re.MULTILINE)
        except OSError:
            continue
        return int(found.group(1)) if found else None
    return None
