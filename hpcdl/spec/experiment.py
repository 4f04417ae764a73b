"""The whole experiment: the one object that crosses from the login node to the compute nodes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge

from hpcdl.spec.cluster import ClusterSpec
from hpcdl.spec.compress import OffloadSpec, PeftSpec, PruneSpec, QuantSpec
from hpcdl.spec.data import DataSpec
from hpcdl.spec.model import ModelSpec
from hpcdl.spec.parallel import ParallelSpec
from hpcdl.spec.train import OptimSpec, TaskSpec, TrainerSpec
from hpcdl.spec.watch import MonitorSpec, PreflightSpec, TrackerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentSpec:
    """All that a run is made of; written to spec.yaml and read back on the compute nodes."""

    name: str
    """Name of the experiment: a folder below `runs_dir`."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the split, the order of the data, the initial weights and dropout."""
    train: Literal["auto", "full"] = "auto"
    """`full`: every weight is trained, and a method that freezes some is refused; `auto`: what `peft` says."""
    model: ModelSpec
    data: DataSpec
    parallel: ParallelSpec
    peft: PeftSpec
    quant: QuantSpec
    prune: PruneSpec
    offload: OffloadSpec
    task: TaskSpec
    optim: OptimSpec
    trainer: TrainerSpec
    cluster: ClusterSpec
    tracker: TrackerSpec
    monitor: MonitorSpec
    preflight: PreflightSpec = field(default_factory=PreflightSpec)
    code: str | None = None
    """Which code runs: hpcdl's version, a digest of its files, the commit. The launcher writes it."""


def default_runs_dir() -> str:
    """`$HPCDL_RUNS`, or `runs` below the current directory."""
    return os.environ.get("HPCDL_RUNS") or "runs"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """What the launcher does with an experiment; no part of the experiment, nor of its run id."""

    runs_dir: str = field(default_factory=default_runs_dir)
    """Folder of all runs."""
    dry_run: bool = False
    """Print what would be submitted and change nothing."""
    wait: bool = False
    """Follow a submitted job to its end and exit as it does."""
    force: bool = False
    """Make a new run even where the same experiment has one."""
    force_fit: bool = False
    """Submit also what by its plan can't fit into memory (hpcdl.launch.planning)."""
    parsable: bool = False
    """Print one line a run: run_id, job_id, run_dir, tab-separated."""
    after: str | None = None
    """Start only once these runs or jobs, with commas between, have succeeded (sbatch --dependency=afterok)."""
    strict: bool = False
    """Refuse a whole sweep when one of its points can't be, rather than leave that point out."""
    readable_by: Literal["owner", "group", "all"] = "owner"
    """Who may read the run's files, whatever the umask; nobody but the owner ever writes them."""
