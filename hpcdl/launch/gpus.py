"""What nvidia-smi says of a node's GPUs: are they there, healthy, and nobody else's?

Fields: `nvidia-smi --help-query-gpu`. The clocks' names are those of drivers before 535, which later ones still take.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_LIMIT_S = 10.0
"""A driver that doesn't answer by then has lost a GPU (Xid 79) or hangs."""
_FIELDS = (
    "index",
    "uuid",
    "memory.used",
    "memory.total",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_slowdown",
    "clocks_throttle_reasons.hw_thermal_slowdown",
)
_USED_SHARE = 0.05
"""Of a GPU's memory what its driver may hold while nobody uses it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU."""

    index: str
    uuid: str
    used_mib: float
    total_mib: float
    ecc_errors: int
    """Uncorrected, since the driver was loaded."""
    slow: bool
    """Whether the hardware holds its clocks down: heat, or power."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process that has memory on a GPU."""

    pid: int
    uuid: str
    used_mib: str
    """As nvidia-smi says it: it may not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What there is."""

    gpus: tuple[Gpu, ...] = ()
    holders: tuple[Holder, ...] = ()
    error: str = ""
    """nvidia-smi's own words, where it failed."""

    def problems(self, wanted: int) -> list[str]:
        """Why the node is not fit for `wanted` GPUs (0: for whatever is there)."""
        if self.error:
            return [f"nvidia-smi: {self.error}"]
        found = []
        if len(self.gpus) < wanted:
            found.append(f"{len(self.gpus)} GPUs answer, cluster.gpus_per_node={wanted} were promised")
        for gpu in self.gpus:
            if gpu.ecc_errors:
                found.append(f"GPU {gpu.index} has had {gpu.ecc_errors} uncorrected memory errors (ECC)")
            if gpu.used_mib > _USED_SHARE * gpu.total_mib:
                pids = ", ".join(str(one.pid) for one in self.holders if one.uuid == gpu.uuid)
                whose = f"process {pids} holds" if pids else "somebody holds"
                found.append(f"{whose} {gpu.used_mib:.0f} of {gpu.total_mib:.0f} MiB of GPU {gpu.index}")
        return found

    def warnings(self) -> list[str]:
        """What makes it slow."""
        return [
            f"GPU {gpu.index} is held down by its hardware (heat, power): it is slower than it could be"
            for gpu in self.gpus
            if gpu.slow
        ]


def look(environment: Mapping[str, str]) -> Look | None:
    """Asks nvidia-smi for this job's GPUs; None where there is no such program: nothing can be told.

    Args:
        environment: CUDA_VISIBLE_DEVICES is Slurm's word on which they are.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    own = ["-i", visible] if visible and visible != "NoDevFiles" else []
    said = _ask([f"--query-gpu={','.join(_FIELDS)}", *own])
    if isinstance(said, str):
        return Look(error=said)
    holders = _ask(["--query-compute-apps=pid,gpu_uuid,used_memory", *own])
    return Look(gpus=read_gpus(said), holders=() if isinstance(holders, str) else read_holders(holders))


def read_gpus(rows: Sequence[Sequence[str]]) -> tuple[Gpu, ...]:
    """GPUs from nvidia-smi's rows; what a model of GPU doesn't know (`[N/A]`) counts as nothing."""
    return tuple(
        Gpu(
            index=index,
            uuid=uuid,
            used_mib=_number(used),
            total_mib=_number(total),
            ecc_errors=int(_number(ecc)),
            slow="Active" in (slowdown, thermal),
        )
        for index, uuid, used, total, ecc, slowdown, thermal in rows
    )


def read_holders(rows: Sequence[Sequence[str]]) -> tuple[Holder, ...]:
    """Processes from nvidia-smi's rows."""
    return tuple(Holder(pid=int(pid), uuid=uuid, used_mib=used) for pid, uuid, used in rows)


def _ask(words: Sequence[str]) -> list[list[str]] | str:
    """Its rows, or what it complains of."""
    command = ["nvidia-smi", *words, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no answer ({type(error).__name__})"
    if done.returncode != 0:
        return " ".join((done.stdout + done.stderr).split()) or f"ended with code {done.returncode}"
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
