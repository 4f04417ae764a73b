"""The faults: each does harm to a run that trains, and whatever it did is undone at its end, come what may.

Three are stand-ins. The disk of the runs is a volume of the machine under all containers, so filling it would fill that
machine's, and slowing it would need another driver: the workers' own calls to it fail or hang instead
(tests/chaos/hook). A node whose network is cut still reaches that volume, which is the harder case.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from tests.slurm.cluster import Cluster, Launched
from tests.slurm.harm import come_near_the_limit, cut_off, daemon, kill_agent, kill_worker, killed, wait_idle

HANGS_S = 10.0
"""How long the shared volume answers nothing: less than any limit of hpcdl's."""
FULL_S = 20.0
"""How long the disk is full: a checkpoint is due in it. Only then the workers can write that they couldn't."""


@dataclass(frozen=True)
class Victim:
    """A run that trains, and one of its nodes."""

    cluster: Cluster
    run: Launched
    nodes: list[str]
    node: str
    """The one that is hit, where only one is."""

    @property
    def job_id(self) -> str:
        """The job that it is in now: a successor has another id than the one that was launched."""
        return str(self.cluster.status(self.run.run_id)["job_id"])


Harm = Callable[[Victim], AbstractContextManager[None]]
"""Does the harm when it is entered, undoes it when it is left."""


@dataclass(frozen=True)
class Fault:
    """One thing that can go wrong."""

    name: str
    harm: Harm
    event: tuple[str, ...] | None = None
    """One of these must be new among the run's events before the harm is undone; None: that it trains on will do."""
    many_nodes: bool = False
    """It needs a run on several nodes."""
    checkpoints: int = 0
    """The run must have saved so many, and have them still."""
    at_checkpoint: bool = False
    """It must last over a checkpoint: it begins when one is due soon."""


def _once(act: Callable[[Victim], object]) -> Harm:
    @contextlib.contextmanager
    def harm(victim: Victim) -> Iterator[None]:
        act(victim)
        yield

    return harm


@contextlib.contextmanager
def _slurmd_killed(victim: Victim) -> Iterator[None]:
    victim.cluster.root(victim.node, "touch /run/hold; pkill -9 -x slurmd")
    try:
        yield
    finally:
        daemon("start", victim.node)
        wait_idle(victim.cluster)


def _stopped(service: str) -> Harm:
    @contextlib.contextmanager
    def harm(victim: Victim) -> Iterator[None]:
        daemon("stop", service)
        try:
            yield
        finally:
            daemon("start", service)
            _answers(victim.cluster)

    return harm


def _answers(cluster: Cluster) -> None:
    up = "scontrol ping | grep -q 'is UP' && squeue -h -O jobid >/dev/null && echo up"
    cluster.until(lambda: cluster.shell(up, check=False) or None, "Slurm answers again")


def _disk(state: str, hold_s: float) -> Harm:
    @contextlib.contextmanager
    def harm(victim: Victim) -> Iterator[None]:
        file = shlex.quote(f"{victim.cluster.home}/disk/{state}")
        victim.cluster.shell(f"touch {file}")
        try:
            time.sleep(hold_s)
        finally:
            victim.cluster.shell(f"rm {file}")
        yield

    return harm


def _tear_newest(victim: Victim) -> None:
    """Cuts a file of the newest checkpoint short, and kills a worker at once: before a newer one is saved."""
    kill = f"pkill -9 --oldest -f '^[^ ]* -u -m hpcdl.worker.main {victim.run.run_dir}'"
    tear = f"newest=$(ls -d {victim.run.run_dir}/checkpoints/step-* | tail -n 1); truncate -s 100 $newest/*.distcp"
    victim.cluster.root(victim.node, f"{tear}; {kill}")


def _preempt(victim: Victim) -> None:
    nodes = ",".join(victim.nodes)
    words = f"-p high -w {nodes} -N{len(victim.nodes)} --exclusive"
    victim.cluster.shell(f"sbatch --parsable {words} --wrap 'sleep 3'")


AGAIN = ("restarting", "requeued", "lost")
WORKER = Fault("worker killed", _once(lambda v: kill_worker(v.cluster, v.run, v.node)), AGAIN)
NODE = Fault("node stopped", lambda v: killed(v.cluster, v.node), AGAIN, many_nodes=True)
TORN = Fault("newest checkpoint cut short", _once(_tear_newest), AGAIN, checkpoints=2)
FAULTS = (
    WORKER,
    Fault("agent killed", _once(lambda v: kill_agent(v.cluster, v.run, v.nodes[0])), AGAIN),
    Fault("slurmd killed", _slurmd_killed),
    NODE,
    Fault("network cut", lambda v: cut_off(v.cluster, v.node), AGAIN, many_nodes=True),
    Fault("slurmctld stopped", _stopped("slurmctld")),
    Fault("slurmdbd stopped", _stopped("slurmdbd")),
    Fault("disk full", _disk("full", FULL_S), ("checkpoint_failed",), at_checkpoint=True),
    TORN,
    Fault("preempted", _once(_preempt), AGAIN),
    Fault("out of time", _once(lambda v: come_near_the_limit(v.cluster, v.job_id)), AGAIN),
    Fault("shared volume hangs", _disk("hung", HANGS_S)),
)
