"""Why a run ended: what its ranks, its workers' outcome and Slurm's own output file say."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hpcdl.runs.state import RunState
from hpcdl.runs.store import SUBMISSIONS, RunDir

FIRST = "first"
"""In the name of an error file: what the first node's agent takes a failure to come from."""
BEGINNINGS = ("started", "restarted", "resumed", "requeued")
"""Events after which what failed before is no longer the cause."""


OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate memory|not enough memory)|CUDA (error: )?out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED|std::bad_alloc|\[Errno 12\]|Cannot allocate memory"
)
"""What allocators say in an error of a general type."""


def is_out_of_memory(kind: str, message: str) -> bool:
    """Whether an error says that memory ran out: an expected result of a sweep, and no crash.

    Args:
        kind: the exception's class.
        message: its message.
    """
    # torch.OutOfMemoryError, MemoryError, and numpy's _ArrayMemoryError.
    return kind.endswith(("OutOfMemoryError", "MemoryError")) or bool(OUT_OF_MEMORY.search(message))


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The first thing that went wrong on any rank."""

    type: str
    message: str
    rank: int | None
    """Global rank; null where no worker is to blame."""
    node: str
    traceback: str
    time: str
    killed_by_kernel: bool = False
    """Whether the node's kernel killed it for want of memory."""
    peak_memory_bytes: int | None = None
    """The most that the rank has held, where it could still say so."""
    signal: int = 0
    """The signal that ended the rank; 0 where it ended by itself."""
    by_torchrun: bool = False
    """Whether torchrun found the rank dead."""
    told: str = ""
    """Its kind (hpcdl.runs.kinds), where who saw it said so."""
    attempt: str = ""
    """The try, `<attempt>.<requeue>`."""
    restart: int | None = None
    """Restarts in place before it; null: the try's end."""
    is_verdict: bool = False
    """Whether it is what the first node's agent has decided that the failure comes from."""

    @property
    def kind(self) -> str:
        """What it is."""
        from hpcdl.runs.kinds import kind_of  # which reads words as this module does

        return self.told or kind_of(
            self.type, self.message, by_signal=bool(self.signal), by_kernel=self.killed_by_kernel
        )

    @property
    def out_of_memory(self) -> bool:
        """Whether it is that memory ran out."""
        return self.killed_by_kernel or is_out_of_memory(self.type, self.message)

    @property
    def text(self) -> str:
        """One line: `<Type>: <message> (rank r, node n)`."""
        lines = self.message.strip().splitlines()
        head = f"{self.type}: {lines[0]}" if lines else self.type
        where = f"node {self.node}" if self.rank is None else f"rank {self.rank}, node {self.node}"
        return f"{head} ({where})"


class Seen(Protocol):
    """What counts of something that went wrong."""

    @property
    def time(self) -> str:
        """UTC, ISO 8601."""
        ...

    @property
    def rank(self) -> int | None:
        """Whose."""
        ...

    @property
    def signal(self) -> int:
        """What ended it, or 0."""
        ...

    @property
    def by_torchrun(self) -> bool:
        """Whether torchrun found it."""
        ...

    @property
    def kind(self) -> str:
        """One of hpcdl.runs.kinds."""
        ...


_Any = TypeVar("_Any", bound=Seen)
_FOUND_LATE_S = 1.0
"""torchrun finds a dead worker after the others have lost their connection to it, and tells whole seconds."""
_ECHO_S = 2.0
"""Nodes' clocks differ by less: a broken connection that one rank tells of so much earlier than another one tells what
has really gone wrong with it is what that did to the first."""


def earliest(found: Sequence[_Any]) -> _Any | None:
    """What the others come from: the first thing that went wrong.

    What torchrun found counts where a signal ended the rank, or the rank said nothing itself; none of it where ranks
    hung, which their agents have then ended. A lost connection gives way to another rank's own error.
    """
    spoken = {one.rank for one in found if not one.by_torchrun}
    heard = [
        one
        for one in found
        if not one.by_torchrun or one.signal or (one.rank is not None and one.rank not in spoken)
    ]
    if any(one.kind == "hang" for one in heard):
        heard = [one for one in heard if not one.by_torchrun]
    first = min(heard or found, key=_when, default=None)
    if first is None or first.kind != "network":
        return first
    until = later(first.time, _ECHO_S)
    own = [one for one in heard if not one.by_torchrun and one.kind != "network" and one.time <= until]
    return min(own, key=_when, default=first)


def _when(one: Seen) -> str:
    return later(one.time, -_FOUND_LATE_S) if one.by_torchrun else one.time


def later(time: str, seconds: float) -> str:
    """A time so many seconds later; what is no time stays as it is."""
    try:
        return (datetime.fromisoformat(time) + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")
    except ValueError:
        return time


def root_cause(run: RunDir, since: str | None = None) -> Failure | None:
    """The first thing that went wrong in this try: the others mostly fail because of it.

    Args:
        run: the run.
        since: errors before this time are of an earlier try; by default the last event that began one.
    """
    found = failures(run)
    if not found:  # nearly always: no need to read what happened
        return None
    since = last_beginning(run) if since is None else since
    return earliest([one for one in found if one.time >= since])


def failures(run: RunDir) -> list[Failure]:
    """All that ranks and agents have left, of all tries."""
    return [one for one in map(_read_failure, sorted(run.errors.glob("*.json"))) if one]


def last_beginning(run: RunDir) -> str:
    """When the present try began (UTC, ISO 8601); empty if none has."""
    return max((str(e.get("time", "")) for e in run.events() if e.get("event") in BEGINNINGS), default="")


_NAME = re.compile(r"try([\d.]*\d)(?:-restart(\d+))?-")


def _read_failure(path: Path) -> Failure | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, json.JSONDecodeError):
        return None
    if not isinstance(record, dict):
        return None
    rank, peak, signal = record.get("rank"), record.get("peak_memory_bytes"), record.get("signal")
    named = _NAME.match(path.name)
    return Failure(
        type=str(record.get("type", "Error")),
        message=str(record.get("message", "")),
        rank=rank if isinstance(rank, int) else None,
        node=str(record.get("node", "?")),
        traceback=str(record.get("traceback", "")),
        time=str(record.get("time", "")),
        killed_by_kernel=bool(record.get("out_of_memory", False)),
        peak_memory_bytes=peak if isinstance(peak, int) else None,
        signal=signal if isinstance(signal, int) else 0,
        by_torchrun=bool(record.get("by_torchrun", False)),
        told=str(record.get("kind") or ""),
        attempt=named.group(1) if named else "",
        restart=int(named.group(2)) if named and named.group(2) else None,
        is_verdict=f"-{FIRST}-" in path.name,
    )


def outcome(run: RunDir) -> dict[str, Any]:
    """How the loop of this try ended, as rank 0 wrote it; empty if it didn't get there."""
    try:
        record = json.loads(run.outcome_file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    if not isinstance(record, dict) or str(record.get("time", "")) < last_beginning(run):
        return {}
    return record


def log_files(run: RunDir, attempt: int | None = None) -> list[Path]:
    """The run's log files, oldest try first; of one launch only, if `attempt` is given."""
    pattern = "*-try*.log" if attempt is None else f"*-try{attempt}.*.log"
    return sorted(run.logs.glob(pattern), key=lambda path: (log_try(path), path.name))


def log_try(path: Path) -> tuple[int, int]:
    """Attempt and requeue of a name `<node>-try<attempt>.<requeue>.log`; (-1, -1) if it has none."""
    attempt, _, requeue = path.name.removesuffix(".log").rpartition("-try")[2].partition(".")
    return (int(attempt), int(requeue)) if attempt.isdigit() and requeue.isdigit() else (-1, -1)


def own_output(run: RunDir, state: RunState) -> Path | None:
    """What the job itself wrote, before the agent could speak: Slurm's output file, or the local shell's."""
    if state.submission is None:
        return None
    folder = run.runs_dir / SUBMISSIONS / state.submission
    if state.kind == "local":
        return folder / "local.out" if (folder / "local.out").exists() else None
    if state.job_id is None:
        return None
    files = sorted(folder.glob("*.out"))
    task = state.job_id.partition("_")[2]
    exact = [path for path in files if path.stem.endswith(f"-{state.job_id}")]
    return next(iter(exact or [path for path in files if task and path.stem.endswith(f"_{task}")]), None)


_FATAL, _TERMINATE = "Fatal Python error: ", "terminate called "
_TELLING = (
    r".*terminate called .*",
    r"\s*what\(\): .*",
    r".*Fatal Python error: .*",
    r"(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Exit)(?:: .*)?",
    r".*: Assertion .* failed\.?",
    r"(?:free|malloc|munmap_chunk|realloc|double free|corrupted)\b.*",
    r".*(?:symbol lookup error|cannot open shared object file|error while loading shared libraries).*",
    r".*: (?:can't open file|No module named) .*",
)
_TELLS = re.compile("|".join(_TELLING))


def telling(lines: Sequence[str]) -> str:
    """What of a dead process's last lines says why, in one line; empty where none does.

    C++ says it in two (`terminate called …`, `what(): …`), Python in the line after its traceback.
    """
    said = [_less_before(line.strip()) for line in lines if _TELLS.fullmatch(line.rstrip())]
    if not said:
        return ""
    last = said[-1]
    if last.startswith(_FATAL) and len(said) > 1:
        last = said[-2]  # faulthandler only says that there was a signal
    if last.startswith("what():") and len(said) > 1:
        before = [line for line in said if line.startswith("terminate called")]
        return f"{before[-1]}: {last.removeprefix('what():').strip()}" if before else last
    return last


def _less_before(line: str) -> str:
    """Such a line without what stood on it before: nobody had ended it."""
    return next((line[line.index(begin) :] for begin in (_FATAL, _TERMINATE) if begin in line), line)


def last_words(path: Path | None, window: int = 8192) -> str:
    """The last line of a file that isn't blank; empty if there is none."""
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - window))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Slurm's own farewell ("Exited with exit code 1") says less than what stands before it.
    slurms = ("srun: ", "slurmstepd: ")
    telling = [
        line
        for line in lines
        if not line.startswith(slurms) or ("error" in line and "Exited with exit code" not in line)
    ]
    return (telling or lines or [""])[-1]
