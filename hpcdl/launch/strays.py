"""Processes that an earlier run has left behind on this node.

Each process below an agent has the agent's name in its environment. One whose agent is dead belongs to nobody: its
own parent died, and Slurm with proctrack/linuxproc has lost it. It may hold a GPU for days.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hpcdl.launch.child import started_at

AGENT = "HPCDL_AGENT"
"""Environment variable of everything below an agent: `<pid>:<its start>:<its job>`. sbatch hands it on to jobs that
are submitted from inside a run; those have a job id of their own, and are no part of it."""
_TOLERANCE_S = 2.0
_KILL_LIMIT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stray:
    """A process without an agent."""

    pid: int
    command: str
    whose: str
    """`job 12`, or the try of a run on this machine."""

    @property
    def words(self) -> str:
        """For people."""
        return f"process {self.pid} ({self.command})"


def name_of_this_agent() -> str:
    """What stands in the environment of everything below this process."""
    return f"{os.getpid()}:{started_at(os.getpid()):.2f}:{os.environ.get('SLURM_JOB_ID', '')}"


def find(proc: Path = Path("/proc")) -> list[Stray]:
    """This user's processes whose agent is dead, in this container or on this machine."""
    found = []
    here = _namespace(proc / "self")
    for entry in os.scandir(proc):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        place = Path(entry.path)
        with contextlib.suppress(OSError, ValueError):  # another user's, or gone meanwhile
            environment = _environment(place)
            job = environment.get("SLURM_JOB_ID", "")
            *agent, of_job = environment.get(AGENT, ":").split(":")
            # Another container's processes count in their own way: nothing can be said of their agents.
            if len(agent) != 2 or of_job != job or _namespace(place) != here or _lives(*agent):
                continue
            words = (place / "cmdline").read_bytes().split(b"\0")
            command = " ".join(word.decode(errors="replace") for word in words[:4] if word)
            whose = f"job {job}" if job else f"try {environment.get('HPCDL_TRY', '?')} of a run"
            found.append(Stray(pid=int(entry.name), command=command[:80] or "?", whose=whose))
    return found


def end(strays: Iterable[Stray]) -> tuple[list[Stray], list[Stray]]:
    """Kills them; those that are gone, and those that the kernel doesn't let go."""
    left = list(strays)
    for stray in left:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(stray.pid, signal.SIGKILL)
    deadline = time.monotonic() + _KILL_LIMIT_S
    alive = left
    while alive and time.monotonic() < deadline:
        time.sleep(0.02)
        alive = [stray for stray in alive if _runs(stray.pid)]
    return [stray for stray in left if stray not in alive], alive


def _environment(place: Path) -> dict[str, str]:
    pairs = (pair.partition(b"=") for pair in (place / "environ").read_bytes().split(b"\0"))
    return {key.decode(errors="replace"): value.decode(errors="replace") for key, _, value in pairs}


def _namespace(place: Path) -> str:
    return str((place / "ns" / "pid").readlink())


def _lives(pid: str, started: str) -> bool:
    try:
        return _runs(int(pid)) and abs(started_at(int(pid)) - float(started)) < _TOLERANCE_S
    except OSError:
        return False


def _runs(pid: int) -> bool:
    """Whether it is there, and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
