"""The lines of `system-<node>.jsonl`: what a node's processes and GPUs did, a line a sample.

The agent of each node writes them, whoever looks reads them: `hpcdl top`, `hpcdl report`, the leak detector, trackers.
A key that could not be measured is null, which is not 0. A reader takes lines of other versions: keys that it doesn't
know are passed over, keys that are missing have their default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hpcdl.runs.files import read_lines
from hpcdl.runs.store import RunDir

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
    node: str = ""
    attempt: str = ""
    """The try, as in the names of logs: `0.0`."""
    cpu_percent: float | None = None
    """Of one core, over the run's processes here."""
    rss_bytes: int | None = None
    """Over the run's processes here."""
    pss_bytes: int | None = None
    node_cpu_percent: float | None = None
    """Of all the node's cores, whoever uses them."""
    memory_available_bytes: int | None = None
    """What the node, or the job's control group if that is less, has left."""
    memory_limit_bytes: int | None = None
    """What the node has, or the job's control group if that is less."""
    net_sent_bytes: int | None = None
    """Over all the node's network interfaces but loopback, since the agent began."""
    net_received_bytes: int | None = None
    processes: tuple[ProcessSample, ...] = ()
    gpus: tuple[GpuSample, ...] = ()

    @property
    def ranks(self) -> tuple[ProcessSample, ...]:
        """The workers, by rank."""
        found = [each for each in self.processes if each.role == "rank" and each.rank is not None]
        return tuple(sorted(found, key=lambda each: each.rank or 0))


def as_line(sample: NodeSample) -> dict[str, Any]:
    """A sample as it is written; what is null or empty is left out."""
    line: dict[str, Any] = _less_nothing(dataclasses.asdict(sample))
    return line


def of_line(line: Mapping[str, Any], node: str = "") -> NodeSample:
    """A line as a sample.

    Args:
        line: of `system-<node>.jsonl`.
        node: the node in the file's name, for lines that don't name theirs.
    """
    processes, gpus = line.get("processes"), line.get("gpus")
    known: dict[str, Any] = {"time": "", "node": node, **_known(NodeSample, line)}
    known["processes"] = tuple(
        ProcessSample(**_known(ProcessSample, each)) for each in _objects(processes) if "pid" in each
    )
    known["gpus"] = tuple(
        GpuSample(**{**_known(GpuSample, each), "throttled": tuple(each.get("throttled") or ())})
        for each in _objects(gpus)
        if "index" in each
    )
    return NodeSample(**known)


def nodes(run: RunDir) -> list[str]:
    """The nodes that have written samples, by name."""
    return sorted(
        file.name.removeprefix("system-").removesuffix(".jsonl") for file in run.path.glob("system-*.jsonl")
    )


def read(run: RunDir, node: str) -> Iterator[NodeSample]:
    """A node's samples, the oldest first; half a line at the end is left out."""
    for line in read_lines(run.path / f"system-{node}.jsonl"):
        yield of_line(line, node)


def _known(kind: type[Any], line: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {key: value for key, value in line.items() if key in names}


def _objects(value: object) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []


def _less_nothing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _less_nothing(each) for key, each in value.items() if each not in (None, (), [])}
    return [_less_nothing(each) for each in value] if isinstance(value, list | tuple) else value
