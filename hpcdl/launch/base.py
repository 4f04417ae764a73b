"""What every backend offers: a pure `render`, and a `submit` that sends the very text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hpcdl.runs.parents import Parent
from hpcdl.spec import ClusterSpec
from hpcdl.spec.container import Mount


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a run's nodes are given where they can't read what the launcher writes."""

    text: str
    """The content of spec.yaml."""
    attempt: int
    """Which launch of the run it is (RunState.attempt)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """One submission: runs of one resource shape, an array task each."""

    token: str
    """Names the submission before the scheduler does; its folder is `<runs_dir>/.submissions/<token>`."""
    name: str
    """Name of the experiment, for the job's name."""
    cluster: ClusterSpec
    """The resources that every run of this submission gets."""
    runs_dir: Path
    """Absolute."""
    run_dirs: tuple[Path, ...]
    """Absolute; array task i carries run_dirs[i]."""
    python: str
    """Python on the compute nodes."""
    parents: tuple[Parent, ...] = ()
    """What must have succeeded first."""
    code: Path | None = None
    """The copy of hpcdl that the job runs (hpcdl.launch.frozen); null: what is installed."""
    specs: Mapping[Path, Given] = field(default_factory=dict)
    """By run directory, where the text that is submitted holds the specs (Kubernetes)."""

    mounts: tuple[Mount, ...] = ()
    """What a container shows of the nodes' files (hpcdl.launch.containers)."""

    @property
    def after_jobs(self) -> tuple[str, ...]:
        """Slurm's jobs that must have succeeded first, each once."""
        return tuple(dict.fromkeys(p.job_id for p in self.parents if p.job_id is not None))

    @property
    def folder(self) -> Path:
        """Where the submission's own files lie."""
        return self.runs_dir / ".submissions" / self.token


class Backend(Protocol):
    """A place to run: one file in hpcdl/launch/, found by the cluster's `kind`."""

    def render(self, request: JobRequest) -> str:
        """The text that `submit` would send; touches nothing."""
        ...

    def submit(self, request: JobRequest, text: str) -> str | None:
        """Sends `text`; returns the scheduler's job id (an array's own), or None where there is none.

        Raises:
            SchedulerError: the scheduler could not be reached or refused; carries its words.
        """
        ...
