"""What the kernel says of memory: has it killed a process of this job because there was none left?"""

from __future__ import annotations

import re
from pathlib import Path

from hpcdl.plan.cgroups import CGROUPS, MEMBERSHIP, of_memory


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
    groups = of_memory(membership, cgroups)
    if groups is None:
        return None
    file = "memory.oom_control" if groups.version == 1 else "memory.events"
    for place in (groups.folders[0], groups.folders[-1]):  # in a container the path may be the host's
        try:
            found = re.search(r"^oom_kill (\d+)$", (place / file).read_text(encoding="utf-8"), re.MULTILINE)
        except OSError:
            continue
        return int(found.group(1)) if found else None
    return None
