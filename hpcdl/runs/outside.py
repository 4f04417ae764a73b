"""Slurm's commands for an agent that runs inside of a container, where there are none.

hpcdl.launch.steps, which is outside on the job's first node, runs them for it: over a socket of the node's network
namespace, which containers on a cluster share, without a name in the file system. Each end makes sure that the other
one is the same user's; only Slurm's commands are run, as the job's own user, with the job's own environment. An agent
of another node finds nobody there, and goes on as where Slurm doesn't answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence

from hpcdl.runs.patience import MISSING

VARIABLE = "HPCDL_OUTSIDE"
"""Environment variable: the socket's name. Set where Slurm's commands are outside."""
COMMANDS = frozenset({"sbatch", "scontrol", "squeue", "scancel", "sinfo", "sacct"})
_ROOM_S = 5.0
"""What an answer may take beyond the command's own limit."""
_MOST_BYTES = 1 << 24

Done = subprocess.CompletedProcess[str]
Run = Callable[[Sequence[str], str, float], Done]
"""(command, its input, seconds that it may take) → what became of it."""


def is_here(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is inside: Slurm's commands are somebody else's to run."""
    return VARIABLE in environment


def run(command: Sequence[str], text: str, limit_s: float) -> Done:
    """Has a command run outside.

    Args:
        command: one of `COMMANDS`, and its arguments.
        text: its input.
        limit_s: seconds that it may take.

    Returns:
        What became of it; code 124 where there was no answer in time, 127 where nobody is outside on this node.
    """
    asked = {"command": list(command), "text": text, "limit_s": limit_s}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.settimeout(limit_s + _ROOM_S)
            line.connect(_address(os.environ[VARIABLE]))
            _require_mine(line)
            line.sendall(json.dumps(asked).encode())
            line.shutdown(socket.SHUT_WR)
            told = json.loads(_read(line))
    except TimeoutError:
        return Done(
            list(command), 124, "", f"{command[0]}: no answer in {limit_s:g} s from outside the container"
        )
    except (OSError, ValueError) as error:
        words = f"{command[0]} {MISSING}, inside of a container, nor does the outside answer ({error})"
        return Done(list(command), 127, "", words)
    return Done(list(command), int(told["code"]), str(told["out"]), str(told["err"]))


class Outside:
    """The other end: runs what agents of this job ask for, until this process ends.

    Args:
        run: runs one command.
    """

    def __init__(self, run: Run) -> None:
        self.name = f"hpcdl-{os.getuid()}-{secrets.token_hex(16)}"
        """For `VARIABLE`."""
        self._run = run
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(_address(self.name))
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Nobody is outside any more."""
        with contextlib.suppress(OSError):  # wakes the thread up
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(line,), daemon=True).start()

    def _answer(self, line: socket.socket) -> None:
        with line, contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not one of ours, or gone
            _require_mine(line)
            line.settimeout(_ROOM_S)
            asked = json.loads(_read(line))
            command = [str(word) for word in asked["command"]]
            if not command or command[0] not in COMMANDS:
                done = Done(command, 126, "", f"{command[:1]} is no command of Slurm's")
            else:
                done = self._run(command, str(asked["text"]), float(asked["limit_s"]))
            line.settimeout(_ROOM_S)
            told = {"code": done.returncode, "out": done.stdout, "err": done.stderr}
            line.sendall(json.dumps(told).encode())


def _address(name: str) -> str:
    return "\0" + name  # Linux: no file, gone with the socket


def _require_mine(line: socket.socket) -> None:
    """The process at the other end is this user's.

    Raises:
        PermissionError: it isn't.
    """
    _, uid, _ = struct.unpack(
        "3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    if uid != os.getuid():
        raise PermissionError(f"the other end is user {uid}'s")


def _read(line: socket.socket) -> bytes:
    parts, size = [], 0
    while part := line.recv(1 << 16):
        parts.append(part)
        size += len(part)
        if size > _MOST_BYTES:
            raise ValueError("too long")
    return b"".join(parts)
