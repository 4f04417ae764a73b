"""Programs that are all alive and take turns: what else the machine does hits all of them alike.

Each waits at a gate (peers/gate.py) before it reads a batch. Here one is let through for some steps, and says how
long they took, in wall time and in CPU time of its whole process, while the others wait.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

READY_S = 1800.0
"""For a program to import all it needs and come to its first batch, beside all the others."""
TURN_S = 300.0


class TurnError(Exception):
    """A program has ended, or doesn't come back: its times would mean nothing."""


@dataclass(frozen=True, slots=True)
class Took:
    """A step of one turn, on average: of the slowest rank."""

    wall_s: float
    cpu_s: float
    """All threads of the process."""


@dataclass(slots=True)
class Program:
    """One that takes turns."""

    name: str
    processes: list[subprocess.Popen[bytes]]
    """What was started: as many as ranks, or one that starts them."""
    log: Path
    ranks: int
    doors: dict[int, Door] = field(default_factory=dict)
    """By rank."""
    peak_bytes: int = 0
    """Highest mark of memory that the kernel gave a rank of it."""

    def check(self) -> None:
        """Raises TurnError where it has failed."""
        if any(process.poll() for process in self.processes):
            raise TurnError(f"{self.name} failed: {last_words(self.log)}")


@dataclass(slots=True)
class Door:
    """One rank at its gate."""

    pid: int
    connection: socket.socket
    lines: Any

    def let(self, steps: int) -> None:
        self.connection.sendall(f"{steps}\n".encode())


class Gatekeeper:
    """Lets programs through, one at a time.

    Args:
        folder: where the socket lies, and where programs leave their records.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "gate"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(64)
        self._listener.settimeout(1.0)

    def gather(self, programs: Sequence[Program]) -> None:
        """Waits until every rank of every program stands at its first batch.

        Raises:
            TurnError: one has failed, or doesn't come.
        """
        by_name = {program.name: program for program in programs}
        deadline = time.monotonic() + READY_S
        while missing := [program.name for program in programs if len(program.doors) < program.ranks]:
            for program in programs:
                program.check()
            if time.monotonic() > deadline:
                raise TurnError(f"not at the first batch after {READY_S:.0f} s: {', '.join(missing)}")
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(TURN_S)
            lines = connection.makefile("r")
            word = json.loads(lines.readline())
            by_name[word["name"]].doors[word["rank"]] = Door(word["pid"], connection, lines)

    def turn(self, program: Program, steps: int) -> Took:
        """Lets a program do so many steps.

        Raises:
            TurnError: it failed meanwhile.
        """
        for door in program.doors.values():
            door.let(steps)
        try:
            words = [json.loads(door.lines.readline()) for door in program.doors.values()]
        except (OSError, ValueError) as error:
            program.check()
            raise TurnError(
                f"{program.name} left amid its turn ({error}): {last_words(program.log)}"
            ) from error
        for door in program.doors.values():
            program.peak_bytes = max(program.peak_bytes, peak_bytes(door.pid))
        slowest = max(words, key=lambda word: float(word["wall_s"]))
        return Took(slowest["wall_s"] / steps, max(word["cpu_s"] for word in words) / steps)

    def dismiss(self, program: Program, limit_s: float = READY_S) -> None:
        """Lets a program run to its end.

        Raises:
            TurnError: it failed, or doesn't end.
        """
        for door in program.doors.values():
            door.let(10**9)
        try:
            for process in program.processes:
                process.wait(limit_s)
        except subprocess.TimeoutExpired as error:
            raise TurnError(f"{program.name} doesn't end: {last_words(program.log)}") from error
        program.check()

    def close(self) -> None:
        self._listener.close()


def end(programs: Sequence[Program]) -> None:
    """Ends what still runs of these programs: a rank that stands at its gate fails with the connection."""
    for door in (door for program in programs for door in program.doors.values()):
        door.lines.close()
        door.connection.close()
    for process in (process for program in programs for process in program.processes):
        if process.poll() is None:
            process.terminate()
    for process in (process for program in programs for process in program.processes):
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def peak_bytes(pid: int) -> int:
    """The kernel's mark; 0 where the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM")), 0)


def last_words(log: Path) -> str:
    """The error that a program has ended with, or its last line."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: ?)?[\w.]+(Error|Exception)\b", line)]
    return (errors or lines or ["(no output)"])[-1][:500]


def start(argv: Sequence[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A program in the background; both its outputs go into `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            argv, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
