"""A run's state: Slurm's words, one small JSON file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal[
    "PENDING",
    "RUNNING",
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "PREEMPTED",
    "TIMEOUT",
    "OUT_OF_MEMORY",
    "NODE_FAIL",
    "UNKNOWN",
]

ACTIVE: frozenset[str] = frozenset({"PENDING", "RUNNING", "UNKNOWN"})
"""States of a run that is not over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The content of state.json. Times are UTC, ISO 8601."""

    run_id: str
    name: str
    state: State
    reason: str = ""
    """Why: the queue's reason, or the first line of what went wrong."""
    kind: str
    """The cluster's kind: `local`, `slurm` or `kubernetes`."""
    job_id: str | None = None
    """The scheduler's id; an array task as `123_4`, a Job of Kubernetes' by its name. Null until it is submitted or has
    started."""
    submission: str | None = None
    """Token of the submission that carries the run: a folder below `<runs_dir>/.submissions/`."""
    array_index: int | None = None
    """The run's task in the submission's array."""
    nodes: int
    world_size: int
    max_steps: int
    attempt: int = 0
    """Launches of this run: 0 at first, one more each time a failed run is launched again."""
    restarts: int = 0
    """Restarts in place by torchrun, over the whole run."""
    requeues: int = 0
    """Times the scheduler started the job anew, over the whole run."""
    running_try: str = ""
    """The try that the run belongs to: `<attempt>.<requeue>`, and a third number where the same job has started
    it anew. What an older try still writes is refused (hpcdl.runs.fence)."""
    node_list: tuple[str, ...] = ()
    host: str | None = None
    """Where the agent (hpcdl.launch.job) of the first node runs."""
    agent_pid: int | None = None
    agent_started: float | None = None
    """The agent's start, as psutil's create_time(): a reused pid is told apart by it."""
    exit_code: int | None = None
    created: str
    started: str | None = None
    ended: str | None = None
