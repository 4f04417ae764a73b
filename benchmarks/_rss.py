"""Memory of a command and of all that it starts, watched from outside.

rss    resident pages of every process, added up: what is shared between processes counts once in each.
pss    the same with each shared page shared out among those that have it (a file mapped by four processes
       counts once). Reading it has the kernel walk the page tables, so it is read less often.
vmhwm  the kernel's own highest mark of each process: no sample can miss it, but the marks of several processes
       are not of one moment.

Orphans stay children of this process (PR_SET_CHILD_SUBREAPER): `hpcdl launch` runs a local experiment in a session
of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EVERY_S = 0.03
"""Between two looks."""
PROCESSES_S = 0.3
"""Between two looks for new processes, and at the kernel's marks."""
PSS_SHARE = 0.03
"""Of the time at most may go into reading PSS."""
PR_SET_CHILD_SUBREAPER = 36


@dataclass(slots=True)
class Peak:
    """What was seen of one command."""

    rss_bytes: int = 0
    """Highest sum over the process tree."""
    rss_at_s: float = 0.0
    """When, from the command's start."""
    pss_bytes: int = 0
    """Highest sum of the looks at it: fewer than of the others."""
    vmhwm_bytes: dict[str, int] = field(default_factory=dict)
    """The kernel's mark of each process that had more than 50 MiB, by `pid name`."""
    looks: int = 0
    seconds: float = 0.0
    """From the command's start to its end."""
    code: int = 0
    output: str = ""

    @property
    def vmhwm_highest(self) -> int:
        """Of the largest process."""
        return max(self.vmhwm_bytes.values(), default=0)


def measure(argv: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> Peak:
    """Runs a command to its end; its output goes into `log`."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    peak, over = Peak(), threading.Event()
    with log.open("wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            argv, env={**os.environ, **env}, cwd=cwd, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        watcher = threading.Thread(target=_watch, args=(peak, over, started), daemon=True)
        watcher.start()
        try:
            peak.code = process.wait()
        except BaseException:
            process.terminate()
            process.wait(timeout=30)
            raise
        finally:
            peak.seconds = time.monotonic() - started
            over.set()
            watcher.join()
    peak.output = log.read_text(errors="replace")
    return peak


def _watch(peak: Peak, over: threading.Event, started: float) -> None:
    pss_next = pids_next = 0.0
    pids: list[int] = []
    while not over.wait(EVERY_S):
        if time.monotonic() >= pids_next:  # reading the whole process table is what costs
            pids, pids_next = descendants(os.getpid()), time.monotonic() + PROCESSES_S
            _marks(peak, pids)
        rss = sum(_rss(pid) for pid in pids)
        now = time.monotonic()
        if rss > peak.rss_bytes:
            peak.rss_bytes, peak.rss_at_s = rss, now - started
        peak.looks += 1
        if now >= pss_next:
            peak.pss_bytes = max(peak.pss_bytes, sum(_pss(pid) for pid in pids))
            took = time.monotonic() - now
            pss_next = now + max(0.2, took / PSS_SHARE)


def descendants(root: int) -> list[int]:
    """Pids of all processes below `root`, by the parents that the kernel tells."""
    import psutil

    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process(root).children(recursive=True)]
    return []


def _rss(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _pss(pid: int) -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        return int(found.group(1)) * 1024 if found else 0
    return 0


def _marks(peak: Peak, pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            said = dict(
                line.split(":", 1)
                for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                if ":" in line
            )
            mark = int(said.get("VmHWM", "0 kB").split()[0]) * 1024
            if mark > 50 << 20:
                name = f"{pid} {said['Name'].strip()}"
                # a process can have its mark begin anew (clear_refs), and hpcdl's workers do
                peak.vmhwm_bytes[name] = max(mark, peak.vmhwm_bytes.get(name, 0))


def free_bytes() -> dict[str, Any]:
    """MemAvailable, as the kernel tells it."""
    import psutil

    memory = psutil.virtual_memory()
    return {"available": memory.available, "total": memory.total}
