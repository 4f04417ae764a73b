"""Which part of which job this process is: read once, from the environment that Slurm and our script set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcdl.errors import UsageError
from hpcdl.runs import chain


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One node of one job; `kind` local: this machine, no scheduler."""

    kind: str
    """`slurm`, `kubernetes` (hpcdl.launch.kube.pod), or `local`."""
    index: int
    """Line of runs.txt that this job carries: its array task."""
    node: int
    """0 for the node that owns the run's state."""
    nodes: tuple[str, ...]
    """Names of the job's nodes, the first one first."""
    name: str
    """This node's name, as Slurm has it."""
    job_id: str | None
    """As Slurm's commands take it: an array's task as `123_4`, never the task's own number, which for one
    of the tasks is the whole array's."""
    rendezvous_id: str
    """Differs from every other job's, and from this job's other tries."""
    requeue: int
    """Number of this try: times that the run's jobs have been started anew in this launch."""
    restarts: int
    """Times that Slurm has started this very job anew; less than `requeue` for a successor of other jobs."""
    head: str | None
    """Address of the first node; null on a single node."""
    port: int
    """Port of the rendezvous; 0 on a single node."""
    again: int | None
    """Times that this very job has started the run anew; null where nobody would (no hpcdl.launch.steps)."""
    token: str
    """The submission that started this process: the name of the folder that runs.txt lies in."""

    @property
    def first(self) -> bool:
        """Whether this node's agent owns the run's state."""
        return self.node == 0

    def attempt(self, launch: int) -> str:
        """The try's number: `<launch>.<requeue>`, and a third where the same job has started it anew.

        Args:
            launch: RunState.attempt.
        """
        return f"{launch}.{self.requeue}" + (f".{self.again}" if self.again else "")


def find(runs_file: Path, index: int | None, environment: Mapping[str, str]) -> Place:
    """This process's place.

    Args:
        runs_file: `<submission>/runs.txt`.
        index: line of it; null: the array task's number, or 0 outside of an array.
        environment: with SLURM_* (from srun) and HPCDL_HEAD, HPCDL_PORT, HPCDL_NODES (from the batch script).

    Raises:
        UsageError: several nodes, but nobody said where the first one is.
    """
    token = runs_file.parent.name
    task = environment.get("SLURM_ARRAY_TASK_ID")
    line = index if index is not None else int(task or 0)
    host = os.uname().nodename
    if "HPCDL_LOCAL" in environment or "SLURM_JOB_ID" not in environment:
        return Place(
            kind="local",
            index=line,
            node=0,
            nodes=(host,),
            name=host,
            job_id=None,
            rendezvous_id=f"{token}-{line}",
            requeue=0,
            restarts=0,
            head=None,
            port=0,
            again=0,
            token=token,
        )
    job = environment["SLURM_JOB_ID"]
    restarts = int(environment.get("SLURM_RESTART_COUNT") or 0)
    requeue = restarts + chain.tries_before(runs_file.parents[2], token)
    nodes = tuple(environment.get("HPCDL_NODES", "").split()) or (environment.get("SLURMD_NODENAME", host),)
    head = environment.get("HPCDL_HEAD") or None
    if len(nodes) > 1 and head is None:
        raise UsageError("HPCDL_HEAD is not set: start the agent through slurm/torchrun.sbatch")
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return Place(
        kind="slurm",
        index=line,
        node=int(environment.get("SLURM_NODEID", 0)),
        nodes=nodes,
        name=environment.get("SLURMD_NODENAME", host),
        job_id=f"{array}_{task}" if array and task else job,
        # SLURM_STEP_ID: several steps one after the other in one salloc must not meet either.
        rendezvous_id=f"{job}.{environment.get('SLURM_STEP_ID', '0')}-{requeue}",
        requeue=requeue,
        restarts=restarts,
        head=head,
        port=int(environment.get("HPCDL_PORT") or 0),
        again=int(environment["HPCDL_AGAIN"]) if "HPCDL_AGAIN" in environment else None,
        token=token,
    )
