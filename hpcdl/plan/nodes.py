"""What Slurm says of a cluster's nodes: kinds of nodes by partition, and the memory that a job gets by default.

Text formats with explicit fields only. Each question is asked once a process, however many points a sweep has.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LIMIT_S = 3.0
"""How long an answer may take: a launch doesn't wait for a controller that is busy, it only knows less then."""
FIELDS = "%P|%D|%c|%m|%G|%f"
"""What sinfo is asked for (-o): partition, nodes, CPUs, MiB, generic resources, features."""
MIB = 2**20
_GPU = re.compile(r"(?:gres/)?gpu(?::([A-Za-z][\w.+-]*))?(?::(\d+))?(?:\(.*\))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeKind:
    """Nodes of one partition that have the same."""

    partition: str
    default: bool
    """Whether the partition is the cluster's default."""
    nodes: int
    """How many there are."""
    cpus: int
    """CPUs that Slurm schedules on one."""
    memory_bytes: int
    """RealMemory."""
    gpus: tuple[tuple[str | None, int], ...]
    """Type and number of its GPUs; None: a type isn't said."""
    features: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """An answer."""

    kinds: tuple[NodeKind, ...] = ()
    why_none: str = ""
    """Why there is none."""


@functools.cache
def ask() -> Said:
    """Every kind of node of the cluster, by one sinfo."""
    said = _run(["sinfo", "-h", "-a", "-e", "-o", FIELDS])
    if isinstance(said, Said):
        return said
    kinds = tuple(read(said))
    return Said(kinds=kinds, why_none="" if kinds else "sinfo names no node")


def read(text: str) -> Iterator[NodeKind]:
    """The lines of `sinfo -h -e -o FIELDS`; one that means nothing is left out."""
    for line in text.splitlines():
        parts = [part.strip() for part in line.split("|")]
        if len(parts) != 6 or not parts[0]:
            continue
        name, nodes, cpus, memory, gres, features = parts
        if not (nodes.isdigit() and cpus.isdigit() and memory.isdigit()):
            continue
        yield NodeKind(
            partition=name.rstrip("*"),
            default=name.endswith("*"),
            nodes=int(nodes),
            cpus=int(cpus),
            memory_bytes=int(memory) * MIB,
            gpus=gpus(gres),
            features=frozenset(features.split(",")) - {"(null)", ""},
        )


def gpus(gres: str | None) -> tuple[tuple[str | None, int], ...]:
    """Types and numbers of GPUs in generic resources: `gpu:h100:8(S:0-1),nvme:1` gives `h100`, 8.

    Args:
        gres: as sinfo, `--gres` or gres.conf have it.
    """
    items = re.split(r",(?![^(]*\))", gres or "")
    found = (_GPU.fullmatch(item.strip()) for item in items)
    return tuple((match[1], int(match[2] or 1)) for match in found if match)


def slice_bytes(gpu: str) -> int | None:
    """Memory of a MIG slice by its name (`a100_3g.20gb`), its gigabytes taken for 10⁹; None: it is none."""
    found = re.search(r"\dg\.(\d+)gb", gpu)
    return int(found[1]) * 10**9 if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Default:
    """The memory that a job without --mem gets."""

    per_node: int | None = None
    """Bytes; None: all of a node's."""
    per_cpu: int | None = None
    """Bytes of each CPU that it asks for."""


@functools.cache
def configuration() -> str:
    """The cluster's configuration and its partitions, in scontrol's words; empty where nobody answers."""
    said = _run(["scontrol", "-o"], "show config\nshow partition\n")
    return "" if isinstance(said, Said) else said


@functools.cache
def defaults() -> dict[str, Default]:
    """Each partition's default memory, and under `""` the cluster's; empty where Slurm doesn't hold jobs to it."""
    return read_defaults(configuration())


def max_array_size() -> int | None:
    """The cluster's MaxArraySize, which bounds the index of an array's task; None where Slurm doesn't say."""
    found = re.search(r"^MaxArraySize *= *(\d+)", configuration(), re.MULTILINE)
    return int(found[1]) if found else None


def read_defaults(text: str) -> dict[str, Default]:
    """The same from what `scontrol -o` says of the configuration and of partitions."""
    if not _enforced(text):
        return {}
    found = {}
    whole = dict(re.findall(r"^(DefMemPer(?:CPU|Node)) *= *(\S+)", text, re.MULTILINE))
    common = _default(whole)
    found[""] = common
    for line in text.splitlines():
        if name := re.match(r"PartitionName=(\S+)", line):
            own = _default(dict(re.findall(r"(?:^| )(DefMemPer(?:CPU|Node))=(\S+)", line)))
            found[name[1]] = common if own == Default() else own
    return found


def _enforced(text: str) -> bool:
    """Whether a job is ended that takes more memory than it was given: by cgroups, or by Slurm's own count."""
    kept = re.search(r"^ConstrainRAMSpace *= *yes", text, re.MULTILINE | re.IGNORECASE)
    grouped = re.search(r"^TaskPlugin *=.*cgroup", text, re.MULTILINE)
    counted = re.search(r"^JobAcctGatherParams *=.*OverMemoryKill", text, re.MULTILINE | re.IGNORECASE)
    return bool((kept and grouped) or counted)


def _default(values: dict[str, str]) -> Default:
    sizes = {key: int(value) * MIB for key, value in values.items() if value.isdigit() and int(value)}
    return Default(per_node=sizes.get("DefMemPerNode"), per_cpu=sizes.get("DefMemPerCPU"))


def _run(command: Sequence[str], text: str = "") -> str | Said:
    """What the command says, or why it says nothing."""
    if shutil.which(command[0]) is None:
        return Said(why_none=f"there is no {command[0]} on this machine")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SINFO_", "SCONTROL_"))}
    try:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_S,
            env={**kept, "LC_ALL": "C"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Said(why_none=f"{command[0]} gave no answer within {LIMIT_S:g} s")
    except OSError as error:
        return Said(why_none=f"{command[0]}: {error.strerror}")
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return Said(why_none=lines[-1] if lines else f"{command[0]} ended with code {done.returncode}")
    return done.stdout
