"""What breaks a cluster, and makes it whole again: used by tests/slurm and tests/chaos."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator

from tests.slurm.cluster import CLUSTER, Cluster, Launched

PROJECT = os.environ.get("COMPOSE_PROJECT_NAME", "hpcdl")


def docker(*words: str) -> None:
    subprocess.run(["docker", *words], check=True, capture_output=True)


@contextlib.contextmanager
def killed(cluster: Cluster, node: str) -> Iterator[None]:
    """The node's power fails: every process dies, its address is gone."""
    container = f"{PROJECT}-{node}-1"
    docker("kill", container)
    try:
        yield
    finally:
        docker("start", container)
        wait_idle(cluster)


@contextlib.contextmanager
def cut_off(cluster: Cluster, node: str) -> Iterator[None]:
    """The node's network is cut: its processes live on, and nobody hears of them."""
    container, network = f"{PROJECT}-{node}-1", f"{PROJECT}_default"
    docker("network", "disconnect", network, container)
    try:
        yield
    finally:
        docker("network", "connect", "--alias", node, network, container)
        wait_idle(cluster)


def wait_idle(cluster: Cluster) -> None:
    """Slurm uses all nodes again."""

    def back() -> bool | None:
        states = cluster.shell("sinfo -h -N -p debug -o '%N %T'").split()[1::2]
        return True if all(s in ("idle", "mixed", "allocated", "completing") for s in states) else None

    cluster.until(back, "all nodes back", story=lambda: cluster.shell("sinfo -R; sinfo"))


def kill_worker(cluster: Cluster, run: Launched, node: str) -> None:
    """kill -9 of one of the run's workers: torchrun starts them with -u."""
    cluster.root(node, f"pkill -9 --oldest -f '^[^ ]* -u -m hpcdl.worker.main {run.run_dir}'")


def kill_agent(cluster: Cluster, run: Launched, node: str) -> None:
    """kill -9 of the first node's agent: what is below it dies with it."""
    state = json.loads(cluster.shell(f"cat {run.run_dir}/state.json"))
    below = cluster.root(node, f"pgrep -f hpcdl.worker.main.*{run.run_dir}").split()
    cluster.root(node, f"kill -9 {state['agent_pid']}")
    alive = f"ps -o pid= -p {','.join(below)}"
    cluster.until(lambda: True if not cluster.root(node, alive).strip() else None, "no orphan (fact 15)")


def daemon(what: str, service: str) -> None:
    """`docker/cluster stop` or `start`: the daemon, as its administrator does it."""
    subprocess.run([CLUSTER, what, service], check=True, capture_output=True, timeout=120)


def come_near_the_limit(cluster: Cluster, job_id: str) -> None:
    """The job has less than 120 s left, cluster.signal's time, of which Slurm takes notice every 30 s."""
    found = re.search(r"RunTime=(\d+):(\d+):", cluster.shell(f"scontrol show job {job_id}"))
    assert found is not None
    minutes = 60 * int(found.group(1)) + int(found.group(2)) + 2
    cluster.shell(f"scontrol update jobid={job_id} TimeLimit={minutes}")
