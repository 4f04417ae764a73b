"""Why a try of a run failed: the earliest of what its ranks, its nodes' agents and torchrun said."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hpcdl.runs import failure, kinds
from hpcdl.runs.files import write_json
from hpcdl.runs.store import RunDir, now

LastLines = Mapping[int, Sequence[str]]
"""The last lines that ranks have printed, by rank."""

_REPORT = re.compile(r"^\s+(time|host|rank|exitcode)\s*: (.*)$")
_NO_WORDS = re.compile(r"^\s*(=+|-+)?\s*$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One thing that went wrong."""

    time: str
    """UTC, ISO 8601."""
    type: str
    message: str
    node: str
    rank: int | None = None
    """Global rank; null where no worker is to blame."""
    traceback: str = ""
    signal: int = 0
    """The signal that killed the rank; 0 where it ended by itself."""
    by_torchrun: bool = False
    """Whether torchrun found the rank dead; then its time is late, and of use only if the rank said nothing."""
    killed_by_kernel: bool = False
    """Whether the kernel killed a process of this node's part of the job for want of memory."""
    bases: tuple[str, ...] = ()
    """Names of the classes that the exception's class is derived from."""
    number: int | None = None
    """errno of an OSError."""
    code: int | None = None
    """The rank's exit code, where torchrun told it; null where a signal ended it."""
    step: int | None = None
    """The last step that the rank came to, where it could say so."""
    told: kinds.Kind | None = None
    """What it is, where who saw it could tell better than its words do."""

    @property
    def kind(self) -> kinds.Kind:
        """What it is, by which is decided what follows (hpcdl.launch.progress)."""
        if self.told is not None:
            return self.told
        return kinds.kind_of(
            self.type,
            self.message,
            bases=self.bases,
            number=self.number,
            by_signal=bool(self.signal),
            by_kernel=self.killed_by_kernel,
            code=self.code,
        )

    @property
    def out_of_memory(self) -> bool:
        """Whether it is that memory ran out."""
        return self.kind == "memory"

    @property
    def exit_code(self) -> int:
        """The run's exit code: the rank's own, 128 + n where signal n ended it, NEVER_RESTART for a fault."""
        if self.kind == "fault":
            return kinds.NEVER_RESTART
        return 128 + self.signal if self.signal else self.code or 1

    @property
    def reason(self) -> str:
        """One line for state.json and the status table."""
        first = self.message.strip().splitlines()[0] if self.message.strip() else ""
        where = f"node {self.node}" if self.rank is None else f"rank {self.rank}, node {self.node}"
        return f"{self.type}: {first} ({where})" if first else f"{self.type} ({where})"


def find(
    run: RunDir,
    attempt: str,
    words: Iterable[str],
    node: str,
    *,
    killed_by_kernel: bool = False,
    last: LastLines | None = None,
) -> Cause:
    """The root cause: the earliest, except that a death by signal goes before what it did to the others.

    Args:
        run: the run.
        attempt: HPCDL_TRY. What happened before its last restart in place was got over.
        words: the last lines that this node's torchrun said.
        node: this node's name.
        killed_by_kernel: whether this node's kernel has killed a process of the job for want of memory.
        last: the last lines of this node's ranks.
    """
    said = list(words)
    causes = [*_recorded(run, attempt), *_said(said)]
    own = from_torchrun(said, node, killed_by_kernel=killed_by_kernel, last=last)
    return failure.earliest([*causes, own]) or own


def record(
    run: RunDir, attempt: str, node: int, cause: Cause, *, restart: int | None = None, by: str | None = None
) -> None:
    """Leaves this node's cause for the first node's agent: `errors/try<…>-node<k>.json`.

    Args:
        run: the run.
        attempt: HPCDL_TRY.
        node: this node's number.
        cause: what was seen here.
        restart: how often the workers had been restarted in place, where the agent ended them itself and they
            may start anew; null: this node's last word of the try.
        by: what of the agent saw it: each leaves one file a restart. `FIRST`: what it takes the failure to come from.
    """
    plain = {
        "time": cause.time,
        "node": cause.node,
        "rank": cause.rank,
        "type": cause.type,
        "message": cause.message,
        "traceback": cause.traceback,
        "signal": cause.signal,
        "by_torchrun": cause.by_torchrun,
        "out_of_memory": cause.killed_by_kernel,
        "bases": list(cause.bases),
        "errno": cause.number,
        "code": cause.code,
        "step": cause.step,
        "kind": cause.told,
    }
    run.errors.mkdir(exist_ok=True)
    again = "" if restart is None else f"-restart{restart}"
    write_json(run.errors / f"try{attempt}{again}{f'-{by}' if by else ''}-node{node}.json", plain)


def decided(run: RunDir, attempt: str, cause: Cause, restart: int | None = None) -> None:
    """Writes down what a failure comes from, for who looks (hpcdl.runs.first); as `record`."""
    with contextlib.suppress(OSError):  # the disk may be what is wrong
        record(run, attempt, 0, cause, restart=restart, by=failure.FIRST)


def of_nodes(run: RunDir, attempt: str) -> int:
    """How many other nodes' agents have left a cause."""
    return sum(1 for _ in run.errors.glob(f"try{attempt}-node*.json"))


def from_torchrun(
    words: list[str], node: str, *, killed_by_kernel: bool = False, last: LastLines | None = None
) -> Cause:
    """What torchrun's last lines say: its report's root cause, else its last words.

    Args:
        words: those lines.
        node: this node's name.
        killed_by_kernel: whether the kernel has killed a process here; it was the rank that died by SIGKILL.
        last: the last lines of the ranks here.
    """
    report = _root_cause(words)
    code = _number(report.get("exitcode", ""))
    rank = _number(report.get("rank", ""))
    time = _time(report.get("time", ""))
    if code is None or rank is None:
        said = [line for line in words if not (_NO_WORDS.match(line) or line.startswith(kinds.CAUSE))]
        return Cause(
            time=now(),
            type="torchrun",
            by_torchrun=True,
            message=said[-1].strip() if said else "ended without a word",
            node=node,
        )
    return of_exit(code, rank, node, time, killed_by_kernel=killed_by_kernel, last=last)


def of_exit(
    code: int,
    rank: int | None,
    node: str,
    time: str,
    *,
    killed_by_kernel: bool = False,
    last: LastLines | None = None,
) -> Cause:
    """A worker's end as torchrun saw it.

    Args:
        code: as torchrun gives it: the exit code, or less than 0: the signal's number.
        rank: global rank, where it is known.
        node: where it ran.
        time: when it was found; UTC, ISO 8601.
        killed_by_kernel: whether the kernel has killed a process there; it was the rank that died by SIGKILL.
        last: the last lines of the ranks there: what C code prints before it aborts, or Python before hpcdl is there.
    """
    said = list((last or {}).get(-1 if rank is None else rank, ()))
    why = failure.telling(said)
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        starved = killed_by_kernel and name == "SIGKILL"
        hint = why if why and name != "SIGKILL" else "killed by this signal"
        if name == "SIGKILL":
            hint = "killed; by the kernel if memory ran out"
        return Cause(
            time=time,
            type=name,
            message="killed by the kernel: the node's memory, or the job's share of it, was used up"
            if starved
            else hint,
            node=node,
            rank=rank,
            signal=-code,
            by_torchrun=True,
            killed_by_kernel=starved,
            traceback="\n".join(said),
        )
    message = f"the worker ended with code {code}" + (f": {why}" if why else " and said nothing")
    return Cause(
        time=time,
        type="ExitCode",
        message=message,
        node=node,
        rank=rank,
        by_torchrun=True,
        code=code,
        traceback="\n".join(said),
    )


def _recorded(run: RunDir, attempt: str) -> Iterator[Cause]:
    """What ranks and agents have left since the last restart in place.

    By the restart's number in the file's name, or by time: the nodes don't always count restarts alike, and
    a rank can fail before rank 0 has told of the restart.
    """
    found = []
    for file in run.errors.glob(f"try{attempt}-*.json"):
        cause = _read(file.read_text(encoding="utf-8"))
        if cause is not None:
            match = re.search(r"-restart(\d+)-", file.name)
            found.append((int(match.group(1)) if match else 0, cause))
    told, since = _last_restart(run)
    last = max([told, *(number for number, _ in found)])
    if last > told:
        since = min(cause.time for number, cause in found if number == last)
    for number, cause in found:
        if number >= last or cause.time >= since:
            yield cause


def _last_restart(run: RunDir) -> tuple[int, str]:
    """Number and time of this try's last restart in place, as rank 0 told of it; 0 and no time without one."""
    found = (0, "")
    for event in run.events():
        if event.get("event") == "started":
            found = (0, "")
        elif event.get("event") == "restarted":
            found = (int(event.get("restart", 0)), str(event.get("time", "")))
    return found


def _said(words: Iterable[str]) -> Iterator[Cause]:
    """What ranks of this node could only print: the run directory took it not."""
    for line in words:
        cause = _read(line.removeprefix(kinds.CAUSE)) if line.startswith(kinds.CAUSE) else None
        if cause is not None:
            yield cause


def _read(text: str) -> Cause | None:
    try:
        plain: Any = json.loads(text)
    except json.JSONDecodeError:
        return None
    if not isinstance(plain, Mapping):
        return None
    rank, bases = plain.get("rank"), plain.get("bases")
    return Cause(
        time=str(plain.get("time", "")),
        type=str(plain.get("type", "Error")),
        message=str(plain.get("message", "")),
        node=str(plain.get("node", "?")),
        rank=_whole(rank),
        traceback=str(plain.get("traceback", "")),
        signal=int(plain.get("signal", 0)),
        by_torchrun=bool(plain.get("by_torchrun", False)),
        killed_by_kernel=bool(plain.get("out_of_memory", False)),
        bases=tuple(str(name) for name in bases) if isinstance(bases, list) else (),
        number=_whole(plain.get("errno")),
        code=_whole(plain.get("code")),
        step=_whole(plain.get("step")),
        told=plain["kind"] if plain.get("kind") in kinds.WORDS else None,
    )


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _root_cause(words: list[str]) -> dict[str, str]:
    """The fields below «Root Cause» in torchrun's report."""
    for position in range(len(words) - 1, -1, -1):
        if words[position].startswith("Root Cause"):
            break
    else:
        return {}
    found: dict[str, str] = {}
    for line in words[position + 1 : position + 12]:
        match = _REPORT.match(line)
        if match:
            found.setdefault(match.group(1), match.group(2).strip())
    return found


def _number(text: str) -> int | None:
    found = re.match(r"-?\d+", text)
    return int(found.group()) if found else None


def _time(text: str) -> str:
    """Torchrun's local time as UTC; now where there is none."""
    try:
        local = datetime.strptime(text, "%Y-%m-%d_%H:%M:%S").astimezone()
    except ValueError:
        return now()
    return local.astimezone(UTC).isoformat(timespec="milliseconds")
