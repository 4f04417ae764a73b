"""What the cluster in Docker itself must get right."""

from __future__ import annotations

import json

from tests.slurm.cluster import Cluster


def test_nodes_that_promise_more_cpus_than_they_have_are_used(cluster: Cluster) -> None:
    """Without SlurmdParameters=config_overrides they would be INVAL (fact 20)."""
    nodes = cluster.shell("sinfo -h -N -p debug -o '%N %c %T'").split("\n")[:-1]
    assert [line.split()[:2] for line in nodes] == [[f"c{number}", "4"] for number in range(1, 5)]
    assert not [line for line in nodes if "inval" in line or "down" in line]
    # sinfo and `sbatch --test-only` say what a plan asks them, in the words that it understands.
    plan = json.loads(
        cluster.run("hpcdl", "plan", "+experiment=pretrain_tiny", "cluster=slurm", "--json").stdout
    )
    # RealMemory, or with cgroups what a job gets by default
    assert plan["limit_bytes"] in (6000 * 2**20, 1000 * 2**20), plan["hardware"]
    assert plan["start"] is not None, plan["start_said"]
    # As many as they promise: each of the sixteen tasks has a CPU of its own, whatever the machine has.
    told = cluster.shell("srun -N4 -n16 -c1 --exclusive bash -c 'echo $SLURMD_NODENAME'").split()
    assert sorted(told) == sorted(f"c{number}" for number in range(1, 5) for _ in range(4))
