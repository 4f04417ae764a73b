"""Why a run ended: what its ranks, its workers' outcome and Slurm's own output file say."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcdl.runs.state import RunState
from hpcdl.runs.store import SUBMISSIONS, RunDir

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


def root_cause(run: RunDir, since: str | None = None) -> Failure | None:
    """The earliest error of this try: the others mostly fail because of the first.

    Args:
        run: the run.
        since: errors before this time are of an earlier try; by default the last event that began one.
    """
    since = last_beginning(run) if since is None else since
    failures = [f for f in map(_read_failure, sorted(run.errors.glob("*.json"))) if f and f.time >= since]
    return min(failures, key=lambda failure: failure.time, default=None)


def last_beginning(run: RunDir) -> str:
    """When the present try began (UTC, ISO 8601); empty if none has."""
    return max((str(e.get("time", "")) for e in run.events() if e.get("event") in BEGINNINGS), default="")


def _read_failure(path: Path) -> Failure | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, json.JSONDecodeError):
        return None
    if not isinstance(record, dict):
        return None
    rank, peak = record.get("rank"), record.get("peak_memory_bytes")
    return Failure(
        type=str(record.get("type", "Error")),
        message=str(record.get("message", "")),
        rank=rank if isinstance(rank, int) else None,
        node=str(record.get("node", "?")),
        traceback=str(record.get("traceback", "")),
        time=str(record.get("time", "")),
        killed_by_kernel=bool(record.get("out_of_memory", False)),
        peak_memory_bytes=peak if isinstance(peak, int) else None,
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
    telling = [line for line in lines if not line.startswith(("srun: ", "slurmstepd: ")) or "error" in line]
    return (telling or lines or [""])[-1]
