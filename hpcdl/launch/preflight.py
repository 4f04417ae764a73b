"""What a node must have before it trains: looked at on each node by its agent, in less than two seconds.

A node that lacks something is not fit: the run is told which node and what, and goes on without it where it may
(hpcdl.launch.progress). What lies on the disk that all nodes share is no node's fault, and leaves none out.
The all-reduce between nodes is the workers' part (hpcdl.worker.preflight).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcdl.errors import NotFitError
from hpcdl.launch import gpus, strays, torchrun
from hpcdl.launch.causes import Cause
from hpcdl.runs import kinds
from hpcdl.runs.store import RunDir, now

MIN_FREE_BYTES = 64 * 1024**2
"""Below this, not even logs and a small checkpoint have room."""
PROCESS_BYTES = 300 * 1024**2
"""What a worker holds before its model, at least (hpcdl.plan.memory.RUNTIME_BYTES less what workers share)."""
MEMORY_SHARE = 0.9
"""Of `cluster.mem_gb` what must really be free: the kernel and the node's services take some of what Slurm promises."""
ROOM_WAIT_S = 60.0
"""How long to wait for room on a shared disk that is full: whoever filled it may be clearing up, and a job that goes
back into the queue is back in seconds."""
_CLOCK_WARNING_S = 2.0
_GIB = 1024**3


@dataclass(slots=True)
class Report:
    """What was found on a node."""

    node: str
    problems: list[str] = field(default_factory=list)
    """Why it is not fit."""
    shared: list[str] = field(default_factory=list)
    """Why no node is: the shared disk's."""
    warnings: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises what was found.

        Raises:
            NotFitError: something is lacking.
        """
        if self.problems:
            raise NotFitError(self.node, self.problems + self.shared)
        if self.shared:
            raise NotFitError(self.node, self.shared, shared=True)


def check(
    run: RunDir,
    node: str,
    environment: Mapping[str, str] = os.environ,
    in_a_hurry: Callable[[], bool] = lambda: False,
) -> Report:
    """Looks at this node.

    Args:
        run: the run that is to train here.
        node: this node's name.
        environment: with the job's id and its GPUs.
        in_a_hurry: whether not to wait for room: a signal has come.

    Returns:
        What was measured, and what is worth a warning.

    Raises:
        NotFitError: the node lacks something; the message has all of it.
    """
    started = time.perf_counter()
    report = Report(node)
    readable(run, node)
    skew_s = _probe(run, node)
    plain = torchrun.plain_spec(run)
    # A run of an older version has no such section.
    settings: Mapping[str, Any] = plain.get("preflight") or {"name": "none", "disk_gb": None}
    _room(run, plain, settings["disk_gb"], report, in_a_hurry)
    if settings["name"] != "none":
        _clock(skew_s, settings["clock_s"], report)
        _own_disk(report)
        _memory(plain["cluster"], report)
        _left_behind(environment, report)
        _gpus(plain["cluster"], environment, report)
    report.measured["seconds"] = round(time.perf_counter() - started, 3)
    report.check()
    return report


def readable(run: RunDir, node: str) -> None:
    """The run directory is there.

    Raises:
        NotFitError: it isn't.
    """
    if not run.spec_file.is_file():
        lacking = f"{run.spec_file} can't be read: runs_dir must lie on a disk that all nodes share"
        raise NotFitError(node, [lacking])


def _probe(run: RunDir, node: str) -> float:
    """The run directory can be written; how far this node's clock is ahead of its disk's, in seconds.

    Raises:
        NotFitError: it can't.
    """
    probe = run.path / f".probe-{node}-{os.getpid()}"
    try:
        run.logs.mkdir(exist_ok=True)
        run.errors.mkdir(exist_ok=True)
        with probe.open("wb") as file:
            before = time.time()
            file.write(b"hpcdl\n" * 512)
            file.flush()
            os.fsync(file.fileno())
            after = time.time()
            written = os.fstat(file.fileno()).st_mtime
        probe.unlink()
    except OSError as error:
        # Without permission, or read-only: that may be this node's mount alone.
        shared = kinds.of_exception(error) == "disk"
        problem = f"{run.path} can't be written: {error.strerror}"
        raise NotFitError(node, [problem], shared=shared) from error
    # The disk's server says when it was written: between the two, if its clock is this node's.
    return before - written if written < before else min(0.0, after - written)


def _room(
    run: RunDir,
    plain: Mapping[str, Any],
    disk_gb: float | None,
    report: Report,
    in_a_hurry: Callable[[], bool],
) -> None:
    need, why = MIN_FREE_BYTES, "the run needs"
    if disk_gb is not None:
        need, why = round(disk_gb * _GIB), "preflight.disk_gb says"
    elif "model" in plain:
        from hpcdl.plan.checkpoint import checkpoint_bytes  # with the whole spec: 0.1 s
        from hpcdl.runs.spec import spec_of

        one = checkpoint_bytes(spec_of(plain))
        if one is not None:
            need, why = need + one, "logs and a checkpoint of this experiment need"
    deadline = time.monotonic() + ROOM_WAIT_S
    while (free := shutil.disk_usage(run.path).free) < need:
        if time.monotonic() > deadline or in_a_hurry():
            break
        time.sleep(0.5)
    report.measured["disk_free_gb"] = round(free / _GIB, 2)
    if free < need:
        report.shared.append(f"the disk of {run.path} is full: {_size(free)} are free, {why} {_size(need)}")


def _clock(skew_s: float, limit_s: float, report: Report) -> None:
    report.measured["clock_s"] = round(skew_s, 3)
    if abs(skew_s) > _CLOCK_WARNING_S:
        ahead = "ahead of" if skew_s > 0 else "behind"
        said = f"the clock is {abs(skew_s):.1f} s {ahead} the shared disk's"
        (report.problems if abs(skew_s) > limit_s else report.warnings).append(said)


def _own_disk(report: Report) -> None:
    """The node's own: torchrun's logs, the ranks' signs of life."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    report.measured["tmp_free_gb"] = round(free / _GIB, 2)
    if free < MIN_FREE_BYTES:
        report.problems.append(
            f"{folder} is full: {_size(free)} are free, {_size(MIN_FREE_BYTES)} are needed"
        )


def _memory(cluster: Mapping[str, Any], report: Report) -> None:
    free = available_bytes()
    if free is None:
        return
    report.measured["memory_free_gb"] = round(free / _GIB, 2)
    promised = cluster["mem_gb"] if cluster["kind"] == "slurm" else None
    need = cluster["processes_per_node"] * PROCESS_BYTES
    if promised is not None and free < MEMORY_SHARE * promised * _GIB:
        report.problems.append(
            f"{_size(free)} of memory are free, cluster.mem_gb={promised:g} was promised: others hold the rest"
        )
    elif free < need:
        count = cluster["processes_per_node"]
        report.problems.append(
            f"{_size(free)} of memory are free, {count} workers need at least {_size(need)}"
        )


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that can be had without swapping; None where the kernel doesn't say (proc(5), MemAvailable)."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found) * 1024


def _left_behind(environment: Mapping[str, str], report: Report) -> None:
    """Processes of ours whose agent is dead: under proctrack/linuxproc Slurm loses those that were re-parented."""
    killed, alive = strays.end(strays.find())
    for stray in killed:
        report.warnings.append(f"killed {stray.words}, left behind by {stray.whose}")
    for stray in alive:
        report.problems.append(f"{stray.words}, left behind by {stray.whose}, can't be killed")


def _gpus(cluster: Mapping[str, Any], environment: Mapping[str, str], report: Report) -> None:
    if not cluster["gpus_per_node"] and not str(cluster["gres"] or "").startswith("gpu"):
        return
    found = gpus.look(environment)
    if found is None:
        return
    report.measured["gpus"] = len(found.gpus)
    report.problems += found.problems(cluster["gpus_per_node"])
    report.warnings += found.warnings()


def _size(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size // 1024**2:.0f} MiB"


def cause(error: Exception, node: str) -> Cause:
    """Why this node's part could not begin.

    Args:
        error: what was raised.
        node: this node.
    """
    return Cause(
        time=now(), type=type(error).__name__, message=str(error), node=node, told=kinds.of_exception(error)
    )
