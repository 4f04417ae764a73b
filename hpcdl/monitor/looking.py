"""What an agent and a process of its node say to one another about memory that grows: a question and an answer.

Both are files in the agent's own folder (hpcdl.runs.beats.FOLDER), named by process id. The question is mapped by the
process that is asked: to look for it costs no system call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_QUESTION = struct.Struct("=BxxxI")
"""How often it was asked, modulo 256, and the steps that the look may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growing:
    """A part of what grows."""

    what: str
    """The line's text; a tensor's type, dtype and shape; the allocator."""
    where: str = ""
    """`path:line`; empty where it isn't known."""
    bytes_per_step: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a process has found in itself. All rates are bytes a step (of a loader: a micro-batch that it builds)."""

    pid: int
    first_step: int
    last_step: int
    took_s: float
    """Seconds of the training that the look itself took, but for what tracing slows each allocation."""
    resident: float | None = None
    """Anonymous resident memory."""
    python: float | None = None
    """Python's own objects and numpy's arrays, what was freed meanwhile taken off."""
    malloc_used: float | None = None
    """In use through the C library's malloc: large Python objects, numpy, tensors, C and C++; null: not glibc's."""
    malloc_free: float | None = None
    """Free, and held by malloc."""
    cuda_allocated: float | None = None
    """In use through torch's allocator on this process's GPUs."""
    cuda_reserved: float | None = None
    """Held by it, in use or not."""
    growing: tuple[Growing, ...] = ()
    """Lines of Python and tensors, the largest first."""
    note: str = ""
    """What could not be looked at."""


def ask_file(folder: Path, pid: int) -> Path:
    """The question's file; the process makes it."""
    return folder / f"grow-ask-{pid}"


def answer_file(folder: Path, pid: int) -> Path:
    """The answer's file."""
    return folder / f"grow-answer-{pid}.json"


class Ear:
    """The side that is asked. Raises OSError where the folder can't be written."""

    def __init__(self, folder: Path, pid: int) -> None:
        with ask_file(folder, pid).open("w+b") as file:
            file.truncate(_QUESTION.size)
            self._map = mmap.mmap(file.fileno(), _QUESTION.size)
        self._heard = 0

    def asked(self) -> int:
        """Steps that a look may take; 0: nobody has asked since the last time."""
        if self._map[0] == self._heard:
            return 0
        self._heard, steps = _QUESTION.unpack(self._map[: _QUESTION.size])
        return int(steps)


def ask(folder: Path, pid: int, steps: int) -> bool:
    """Asks a process to look at itself for so many steps; False where it doesn't listen."""
    answer_file(folder, pid).unlink(missing_ok=True)
    try:
        with ask_file(folder, pid).open("r+b") as file:
            count, _ = _QUESTION.unpack(file.read(_QUESTION.size))
            file.seek(0)
            file.write(_QUESTION.pack((count + 1) % 256, steps))
    except (OSError, struct.error):
        return False
    return True


def write(folder: Path, answer: Answer) -> None:
    """Leaves an answer; whole or not at all."""
    file = answer_file(folder, answer.pid)
    new = file.with_suffix(".new")
    new.write_text(json.dumps(dataclasses.asdict(answer)), encoding="utf-8")
    new.replace(file)


def read(folder: Path, pid: int) -> Answer | None:
    """The answer, once it is there."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        plain: Mapping[str, Any] = json.loads(answer_file(folder, pid).read_text(encoding="utf-8"))
        growing = tuple(Growing(**each) for each in plain["growing"])
        return Answer(**{**plain, "growing": growing})
    return None
