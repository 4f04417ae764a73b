"""The lines of `system-<node>.jsonl`: what a node's processes and GPUs did, a line a sample.

The agent of each node writes them, whoever looks reads them: `hpcdl top`, `hpcdl report`, the leak detector, trackers.
A key that could not be measured is null, which is not 0. A reader takes lines of other versions: keys that it doesn't
know are passed over, keys that are missing, or hold what they can't, have their default.

A line is one JSON object. Processes and GPUs stand in it as tables, `{"pid": [11, 12], "rss_bytes": [5, 6]}`, which is
a third of the bytes of a list of objects: a column without values is left out, nulls at its end are, too.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hpcdl.runs.files import last_line
from hpcdl.runs.private import open_to_read
from hpcdl.runs.store import RunDir

_WINDOW = 1 << 18
"""Bytes at a file's end in which its last line is looked for; one has MOST_LISTED processes at most."""
MOST_LISTED = 1000
"""Processes in a line; of a run that has more on a node, loaders and others are counted in the sums only."""

ROLES = ("rank", "loader", "agent", "torchrun", "other")
"""What a process is: a worker, a DataLoader's worker (or another child of a rank), the node's agent, torchrun, and
what else belongs to the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSample:
    """One process of the run."""

    pid: int
    role: str = "other"
    """One of ROLES."""
    rank: int | None = None
    """Global rank: its own, or that of the rank that it is a child of."""
    step: int | None = None
    """Steps that the rank has done (a rank only)."""
    phase: str | None = None
    """What the rank is at (hpcdl.runs.beats.PHASES; a rank only)."""
    rss_bytes: int | None = None
    """Resident memory; shared pages count in each process."""
    pss_bytes: int | None = None
    """Resident memory, shared pages shared out; null in samples in which it is not looked at."""
    file_bytes: int | None = None
    """Of rss_bytes, pages of mapped files (RssFile in /proc/PID/status): the kernel takes them back when it needs them,
    so that they are no leak."""
    cpu_percent: float | None = None
    """Of one core, since the sample before."""
    threads: int | None = None
    open_files: int | None = None
    """Open file descriptors, sockets and pipes included."""
    read_bytes: int | None = None
    """Read from disks since it began."""
    written_bytes: int | None = None
    """Written to disks since it began."""
    gpu_memory_bytes: int | None = None
    """Held on all GPUs of the node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """One GPU of the node."""

    index: int
    """As the driver counts."""
    mig: int | None = None
    """Number of the MIG device on it; null: the whole GPU."""
    name: str = ""
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    percent: float | None = None
    """Share of the time in which a kernel ran."""
    power_w: float | None = None
    temperature_c: float | None = None
    throttled: tuple[str, ...] = ()
    """Why its clocks are held down, in NVML's words; empty: they aren't."""
    ecc_uncorrected: int | None = None
    """Uncorrected memory errors since the driver was loaded."""
    xid: int | None = None
    """The driver's last Xid error since the agent began; null: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSample:
    """One look at a node."""

    time: str
    """UTC, ISO 8601."""
    next_s: float | None = None
    """Seconds until the next sample, at the most: a node that is silent for much longer is cut off, or its run over."""
    node: str = ""
    attempt: str = ""
    """The try, as in the names of logs: `0.0`."""
    cpu_percent: float | None = None
    """Of one core, over the run's processes here."""
    rss_bytes: int | None = None
    """Over the run's processes here."""
    peak_rss_bytes: int | None = None
    """The highest of them so far, earlier tries of the run included."""
    pss_bytes: int | None = None
    node_cpu_percent: float | None = None
    """Of all the node's cores, whoever uses them."""
    memory_available_bytes: int | None = None
    """What the node, or the job's control group if that is less, has left."""
    memory_limit_bytes: int | None = None
    """What the node has, or the job's control group if that is less."""
    net_sent_bytes: int | None = None
    """Over the node's network interfaces, since the agent began: those with hardware, else all but loopback."""
    net_received_bytes: int | None = None
    rdma_sent_bytes: int | None = None
    """Over the node's InfiniBand and RoCE ports, since the agent began; what NCCL sends doesn't pass through the
    interfaces above."""
    rdma_received_bytes: int | None = None
    unlisted: int | None = None
    """Processes of the run that are counted in the sums only."""
    processes: tuple[ProcessSample, ...] = ()
    gpus: tuple[GpuSample, ...] = ()

    @property
    def ranks(self) -> tuple[ProcessSample, ...]:
        """The workers, by rank."""
        found = [each for each in self.processes if each.role == "rank" and each.rank is not None]
        return tuple(sorted(found, key=lambda each: each.rank or 0))


def as_line(sample: NodeSample) -> dict[str, Any]:
    """A sample as it is written; what is null or empty is left out."""
    line = {name: value for name in _FIELDS[NodeSample] if (value := getattr(sample, name)) not in (None, "")}
    for name in _TABLES:
        if table := _columns(getattr(sample, name)):
            line[name] = table
    return line


def of_line(line: Mapping[str, Any], node: str = "") -> NodeSample:
    """A line as a sample.

    Args:
        line: of `system-<node>.jsonl`.
        node: the node in the file's name, for lines that don't name theirs.
    """
    known = {"time": "", "node": node, **_known(NodeSample, line)}
    processes = [ProcessSample(**row) for row in _rows(ProcessSample, line.get("processes")) if "pid" in row]
    gpus = [
        GpuSample(**row) for row in _rows(GpuSample, line.get("gpus") or _gpus_of_old(line)) if "index" in row
    ]
    return NodeSample(**known, processes=tuple(processes), gpus=tuple(gpus))


def file_of(run: RunDir, node: str) -> Path:
    """Where a node's samples are."""
    return run.path / f"system-{node}.jsonl"


def nodes(run: RunDir) -> list[str]:
    """The nodes that have written samples, by name."""
    return sorted(
        file.name.removeprefix("system-").removesuffix(".jsonl") for file in run.path.glob("system-*.jsonl")
    )


def read(run: RunDir, node: str, at_most: int | None = None) -> Iterator[NodeSample]:
    """A node's samples, the oldest first; half a line at the end is left out.

    Args:
        run: the run.
        node: of `nodes(run)`.
        at_most: no more than so many, evenly spaced, the last one among them: for a picture of a long run.
    """
    try:
        file = open_to_read(file_of(run, node))
    except FileNotFoundError:
        return
    with file:
        every, left = 1, 0
        if at_most:
            count = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
            every = max(1, math.ceil(count / at_most))
            left = (count - 1) % every
            file.seek(0)
        for number, raw in enumerate(file):
            if number % every != left % every:
                continue
            try:
                line = json.loads(raw)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield of_line(line, node)


def last(run: RunDir, node: str) -> NodeSample | None:
    """A node's last sample, reading only the file's end; None before the first."""
    line = last_line(file_of(run, node), window=_WINDOW)
    return None if line is None else of_line(line, node)


_TABLES = ("processes", "gpus")
_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
_FIELDS: dict[type[Any], dict[str, tuple[type, ...]]] = {
    kind: {
        field.name: _KINDS.get(str(field.type).partition(" ")[0], ())
        for field in dataclasses.fields(kind)
        if field.name not in _TABLES
    }
    for kind in (NodeSample, ProcessSample, GpuSample)
}
"""What a field may hold, as json gives it; nothing: a list of words."""


def _columns(items: Sequence[Any]) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = {}
    for name in _FIELDS[type(items[0])] if items else ():
        column = [None if value in ("", ()) else value for value in (getattr(item, name) for item in items)]
        while column and column[-1] is None:
            column.pop()
        if column:
            table[name] = column
    return table


def _rows(kind: type[Any], table: object) -> list[dict[str, Any]]:
    """The rows of a table, each without what is null or doesn't fit."""
    if not isinstance(table, Mapping):
        return []
    columns = {
        name: [_fitting(cell, allowed) for cell in table[name]]
        for name, allowed in _FIELDS[kind].items()
        if isinstance(table.get(name), list)
    }
    return [
        {name: cell for name, cell in zip(columns, row, strict=True) if cell is not None}
        for row in zip_longest(*columns.values())
    ]


def _known(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a record what it may hold."""
    found = {name: _fitting(values.get(name), allowed) for name, allowed in _FIELDS[kind].items()}
    return {name: value for name, value in found.items() if value is not None}


def _fitting(value: Any, allowed: tuple[type, ...]) -> Any:
    """A value, if the field may hold it: somebody else may have written the file.

    Neither inf nor nan, nor a whole number that no float can hold: arithmetic on it would fail.
    """
    if value is None:
        return None
    if type(value) in allowed:
        return value if allowed == (str,) or abs(value) < 1e300 else None
    return tuple(str(each) for each in value) if not allowed and isinstance(value, list) else None


def _gpus_of_old(line: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The GPUs of a line as it was before there was a table of them: `gpu_memory_bytes` and `gpu_percent`."""
    memory, percent = (line.get(name) for name in ("gpu_memory_bytes", "gpu_percent"))
    if not isinstance(memory, list):
        return {}
    return {"index": list(range(len(memory))), "memory_used_bytes": memory, "percent": percent or []}
