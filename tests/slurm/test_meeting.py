"""How the agents of a job on several nodes find each other, whatever the site and the user's environment are like."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, Launched
from tests.slurm.test_runs import TINY


@contextlib.contextmanager
def own_name_on_the_loopback(cluster: Cluster, node: str) -> Iterator[None]:
    """As Debian's installer has it: 127.0.1.1 before the real address, which is there as well."""
    hosts = "cat /tmp/hosts > /etc/hosts"  # a file that Docker mounts: it can be written, not replaced
    cluster.root(
        node,
        f"cp /etc/hosts /tmp/hosts.old; {{ echo 127.0.1.1 {node}; cat /etc/hosts; }} > /tmp/hosts; {hosts}",
    )
    try:
        yield
    finally:
        cluster.root(node, f"cp /tmp/hosts.old /tmp/hosts; {hosts}")


@pytest.mark.slow
def test_two_jobs_meet_on_the_same_two_nodes(cluster: Cluster) -> None:
    """Facts 7 (--export=NONE), 8 (CPUs of the step), 13 (loopback) and 14 (ports), which don't disturb each other."""
    words = (
        *TINY, "-m", "seed=1,2", "trainer.max_steps=10", "optim.warmup_steps=0", "cluster.nodes=2",
        "cluster.processes_per_node=1", "cluster.cpus_per_process=2", "trainer.threads_per_process=1",
        'cluster.extra=["--nodelist=c[1-2]"]',
    )  # fmt: skip
    launch = ("env", "SBATCH_EXPORT=NONE", "hpcdl", "launch", "cluster=slurm_docker", *words, "parsable=true")
    with own_name_on_the_loopback(cluster, "c1"):
        assert cluster.root("c1", "hostname --ip-address").split()[0] == "127.0.1.1"
        lines = cluster.run(*launch).stdout.splitlines()
        first, second = (Launched(*line.split("\t")) for line in lines if line.count("\t") == 2)
        cluster.until(lambda: cluster.events(first, "started") or None, "its start")
        steps = cluster.shell(f"scontrol show step {first.job_id}.0")
        assert "Tasks=2" in steps and "CPUs=4" in steps, "two for each task"
        a, b = cluster.wait_done([first, second])
    assert a["started"] < b["ended"] and b["started"] < a["ended"], "at the same time"
    ends = set()
    for run in (first, second):
        log = cluster.shell(f"cat {run.run_dir}/logs/c1-*.log")
        assert "hears node c2" in log
        ends.add(cluster.shell(f"cat {run.run_dir}/errors/* 2>/dev/null; true"))
    assert ends == {""}, "no rank has complained"
