"""A rank's sign of life: one small record in memory that its node's agent reads as well.

A file of the node's own, mapped by the rank: a sign costs no system call and nothing on the shared disk.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

FOLDER = "HPCDL_BEATS"
"""Environment variable: the folder that the agent has made for it; without it nobody listens."""
PHASES = ("start", "step", "evaluation", "checkpoint", "end")
"""What a rank does; only steps take a like time each."""
_RECORD = struct.Struct("=QqqqqqQ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a rank last said."""

    rank: int
    pid: int
    restart: int
    """Restarts in place before this process."""
    step: int
    """Steps done."""
    count: int
    """Signs so far: what tells that it goes on."""
    phase: str


class Heart:
    """The rank's side.

    Args:
        folder: the agent's; None: nobody listens.
        rank: global rank.
        restart: restarts in place before this process.
    """

    def __init__(self, folder: Path | None, rank: int, restart: int) -> None:
        self._rank, self._restart = rank, restart
        self._count, self.step, self._phase = 0, 0, 0
        self._map: mmap.mmap | None = None
        if folder is not None:
            with (folder / f"rank-{rank}-{restart}").open("w+b") as file:
                file.truncate(_RECORD.size)
                self._map = mmap.mmap(file.fileno(), _RECORD.size)
        self.say()

    def say(self, phase: str | None = None, step: int | None = None) -> str:
        """A sign; with a new phase or step if given. Returns the phase until now."""
        before = PHASES[self._phase]
        self._phase = self._phase if phase is None else PHASES.index(phase)
        self.step = self.step if step is None else step
        self._count += 1
        if self._map is not None:
            rest = (self._rank, os.getpid(), self._restart, self.step, self._phase)
            _RECORD.pack_into(self._map, 0, self._count, *rest, self._count)
        return before


def listen(folder: Path, restart: int | None = None) -> list[Beat]:
    """What the node's ranks last said, by rank; a record that is being written is left out.

    Args:
        folder: the agent's.
        restart: what they said after so many restarts in place; None: after the last one.
    """
    found: dict[int, Beat] = {}
    for file in folder.glob("rank-*"):
        try:
            data = file.read_bytes()
        except OSError:
            continue
        if len(data) != _RECORD.size:
            continue
        count, rank, pid, number, step, phase, again = _RECORD.unpack(data)
        if count != again or not count or not 0 <= phase < len(PHASES):
            continue
        beat = Beat(rank=rank, pid=pid, restart=number, step=step, count=count, phase=PHASES[phase])
        wanted = number == restart if restart is not None else True
        if wanted and (rank not in found or found[rank].restart < number):
            found[rank] = beat
    return [found[rank] for rank in sorted(found)]


def stacks_file(folder: Path, rank: int) -> Path:
    """Where a rank dumps its threads' stacks when its agent asks (SIGUSR1)."""
    return folder / f"stacks-{rank}.txt"
