"""torchrun as a child of the agent: how it is started, what it says, and that nothing of it is left behind.

Signals. torchrun is started with SIGUSR1, SIGUSR2, SIGTERM and SIGINT ignored: its own reaction would be to
die, or to kill its workers 30 s later, in the middle of a checkpoint. The workers inherit the ignoring and
install handlers of their own.

Orphans. torchrun asks the kernel to be killed with the agent (PR_SET_PDEATHSIG), each worker to be killed
with torchrun (hpcdl.worker.main does that). Whatever outlives torchrun otherwise becomes the agent's own
child (PR_SET_CHILD_SUBREAPER) and is killed by it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import select
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hpcdl import secrets
from hpcdl.launch.voices import Voices
from hpcdl.runs.kinds import CAUSE
from hpcdl.runs.private import open_to_write

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_IGNORED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
_RANK_LINE = re.compile(rb"\[rank (\d+)\] ")
_FRAME = re.compile(rb"frame #\d+: ")
_CLOSING = re.compile(rb"Sending process (\d+) closing signal")
_FAILED = re.compile(rb"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
CLOSING_GRACE_S = 3.0
"""How long torchrun's workers may live on once it has told them to end, because one of them has failed. They
take its SIGTERM for a wish to save and stop, which they can't do without the dead one: it is the time to say what
has gone wrong with them. torchrun itself would wait 30 s."""
_TICK_S = 0.2
_KILL_LIMIT_S = 10.0
_KEPT_LINES = 200
_KEPT_OF_A_RANK = 60
_PIPE_BYTES = 1 << 20
"""Of lines longer than what is free in a pipe the kernel mixes those of several threads."""

_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant whose own parent dies."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent dies; called between fork and exec."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


class Log:
    """A node's log of one try: each line with the UTC time and who wrote it, nothing buffered.

    `2026-01-31T12:00:00.000+00:00 [rank 0] text`; `[torchrun]` and `[agent]` stand where a rank would. A secret
    of the environment that somebody prints is not in it.

    Args:
        path: the file.
        copy: a descriptor that gets the same; None: nobody does.
    """

    def __init__(self, path: Path, copy: int | None = None) -> None:
        self._descriptor = open_to_write(path, os.O_WRONLY | os.O_APPEND)
        self._copy = copy
        self._lost = 0
        """Lines that found no room."""

    def write(self, lines: Sequence[bytes]) -> None:
        """Appends whole lines; those without a rank are torchrun's own words."""
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds").encode() + b" "
        # The store's stack frames: printed by the other nodes' torchrun at each normal end.
        kept = [line for line in lines if not _FRAME.match(line)]
        marked = (line if _RANK_LINE.match(line) else b"[torchrun] " + line for line in kept)
        self._append(b"".join(stamp + line + b"\n" for line in marked))

    def say(self, text: str) -> None:
        """Appends words of the agent."""
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._append("".join(f"{stamp} [agent] {line}\n" for line in text.splitlines()).encode())

    def _append(self, data: bytes) -> None:
        data = left = secrets.of_this_process().hide_bytes(data)
        if self._copy is not None:
            _write_all(self._copy, data)
        if self._lost:
            left = f"\n[agent] {self._lost} lines are not here: the disk was full\n".encode() + data
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
            self._lost = 0
        except OSError:  # nothing that is only told may end the training
            self._lost += data.count(b"\n")


def _write_all(descriptor: int, data: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        while data:
            data = data[os.write(descriptor, data) :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A worker that torchrun has found dead."""

    code: int
    """Its exit code; less than 0: the number of the signal that ended it."""
    rank: int | None
    """Global rank; null where none of the node's workers had said a word."""
    time: str
    """When; UTC, ISO 8601."""


class Torchrun:
    """One torchrun process and everything below it.

    Args:
        argv: its command line.
        environment: its whole environment.
        log: where its output goes.
    """

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        log: Log,
    ) -> None:
        adopt_orphans()
        parent = os.getpid()

        def prepare() -> None:
            die_with_parent(parent)
            for number in _IGNORED:
                signal.signal(number, signal.SIG_IGN)

        self._process = subprocess.Popen(
            argv,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=prepare,
            process_group=0,  # a Ctrl-C in the agent's terminal must not reach it
        )
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):  # more than the user may have
            fcntl.fcntl(self._process.stdout.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._log = log
        self._voices = Voices()
        self._closing: dict[int, float] = {}
        self.disturbed = False
        """Whether it has said that a worker failed or is told to end: a restart in place may follow."""
        self.failures: list[Failed] = []
        """Each failure of a worker that torchrun has acted on: by a restart in place, or by its own end."""
        self.ranks: set[int] = set()
        """Global ranks that have printed something here."""
        self.words: deque[str] = deque(maxlen=_KEPT_LINES)
        """The last lines that torchrun itself said."""
        self.last: dict[int, deque[str]] = {}
        """The last lines of each rank."""

    @property
    def pid(self) -> int:
        """Torchrun's process id."""
        return self._process.pid

    def watch(self, each_tick: Callable[[], None]) -> int:
        """Pumps the output until torchrun has ended and nothing of it is left; returns its exit code.

        Args:
            each_tick: called several times a second, between reads: the place to act on signals.
        """
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while self._process.poll() is None:
            self._read(descriptor, _TICK_S)
            each_tick()
            self._end_the_closing()
        kill_below(os.getpid())
        while self._read(descriptor, 0.0):
            pass
        self._take(self._voices.end())
        return self._process.returncode

    def signal_workers(self, number: int) -> None:
        """Sends a signal to each worker, not to torchrun."""
        for pid in children(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """Kills torchrun and everything below it, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def _read(self, descriptor: int, wait_s: float) -> bool:
        """Reads what there is, for at most `wait_s` seconds; false once nothing came."""
        ready, _, _ = select.select([descriptor], [], [], wait_s)
        data = os.read(descriptor, 1 << 16) if ready else b""
        if ready and not data:
            time.sleep(wait_s)  # the pipe is closed, the process not yet gone
        self._take(self._voices.take(data) if data else self._voices.late())
        return bool(data)

    def _take(self, lines: Sequence[bytes]) -> None:
        if not lines:
            return
        self._log.write(lines)
        for line in lines:
            if spoke := _RANK_LINE.match(line):
                rank = int(spoke.group(1))
                self.ranks.add(rank)
                text = secrets.hide(line[spoke.end() :].decode(errors="replace"))
                self.last.setdefault(rank, deque(maxlen=_KEPT_OF_A_RANK)).append(text)
                if line.startswith(CAUSE.encode(), spoke.end()):
                    self.words.append(line[spoke.end() :].decode(errors="replace"))
                continue
            if failed := _FAILED.search(line):
                self._note(int(failed.group(1)), int(failed.group(2)))
            self.words.append(secrets.hide(line.decode(errors="replace")))
            found = _CLOSING.search(line)
            self.disturbed |= found is not None or b"failed (exitcode" in line
            if found:
                self._closing[int(found.group(1))] = time.monotonic() + CLOSING_GRACE_S

    def _note(self, code: int, local_rank: int) -> None:
        rank = min(self.ranks) + local_rank if self.ranks else None  # a node's ranks are consecutive
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.failures.append(Failed(code=code, rank=rank, time=time))

    def _end_the_closing(self) -> None:
        late = [pid for pid, deadline in self._closing.items() if time.monotonic() > deadline]
        for pid in late:
            del self._closing[pid]
            if pid in children(self.pid):
                self._log.say(f"killing process {pid}: told to end {CLOSING_GRACE_S:g} s ago, it goes on")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def children(parent: int) -> list[int]:
    """Process ids of a process's children (from /proc)."""
    return [pid for pid, ppid in _parents().items() if ppid == parent]


def kill_below(root: int) -> None:
    """Kills every descendant of a process, and reaps those that are this process's own children.

    Gives up after a while on a process that the kernel doesn't let go (stuck in a disk or a GPU).
    """
    deadline = time.monotonic() + _KILL_LIMIT_S
    while time.monotonic() < deadline:
        parents = _parents()
        below: list[int] = []
        level = [root]
        while level:
            level = [pid for pid, ppid in parents.items() if ppid in level]
            below += level
        if not below:
            return
        for pid in below:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in below:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)


def _parents() -> dict[int, int]:
    """Parent of each process that is no zombie of somebody else."""
    found = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            fields = Path(entry.path, "stat").read_text(errors="replace").rpartition(")")[2].split()
            found[int(entry.name)] = int(fields[1])
    return found


def started_at(pid: int) -> float:
    """When a process started, in seconds since the epoch, as psutil's create_time() counts it."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("btime "):
            return ticks / os.sysconf("SC_CLK_TCK") + float(line.split()[1])
    raise OSError("/proc/stat has no btime")
