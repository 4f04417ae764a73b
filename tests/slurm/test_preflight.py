"""A node that is not fit, and a rank that hangs: named, and the run is done all the same."""

from __future__ import annotations

from tests.slurm.cluster import Cluster
from tests.slurm.test_runs import LONG

BROKEN_GPU = """#!/bin/sh
case "$*" in *compute-apps*) ;; *) echo "0, GPU-c2, 0, 81559, 7, Not Active, Not Active" ;; esac
"""
"""nvidia-smi of a node whose GPU has memory errors; the others have no such program."""


def test_a_node_that_is_not_fit_is_left_out_and_a_hang_is_got_over(cluster: Cluster) -> None:
    cluster.root(
        "c2", f"cat >/usr/local/bin/nvidia-smi <<'END'\n{BROKEN_GPU}END\nchmod 755 /usr/local/bin/nvidia-smi"
    )
    try:
        run = cluster.launch_one(
            *LONG, "trainer.checkpoint_every=100",
            "cluster.nodes=2", "cluster.gres='gpu:1'", "cluster.max_restarts=1", "monitor.hang_factor=10",
            "monitor.hang_min_s=10",
        )  # fmt: skip
        requeued = cluster.until(
            lambda: next(iter(cluster.events(run, "requeued")), None),
            "the requeue",
            story=lambda: cluster.story(run.run_id),
        )
        assert (requeued["kind"], requeued["node"], requeued["exclude"]) == ("node", "c2", ["c2"])
        assert "preflight on node c2: GPU 0 has had 7 uncorrected memory errors (ECC)" in requeued["reason"]
        cluster.wait_step(run, 120)  # looked at a few times: there is a median
        started = cluster.events(run, "started")[-1]
        assert "c2" not in started["node_list"] and started["preflight"]["seconds"] > 0
        stopped = started["node_list"][1]
        cluster.root(stopped, "pkill -STOP -f -- '-u -m hpcdl.worker.main'")  # torchrun has no -u
        hang = cluster.until(
            lambda: next(iter(cluster.events(run, "hang")), None),
            "the hang is seen",
            story=lambda: cluster.story(run.run_id),
        )
        assert (len(hang["ranks"]), hang["nodes"]) == (1, [stopped])
        assert f"({stopped}) stopped (SIGSTOP); rank " in hang["message"] and "waiting in" in hang["message"]
        assert "most recent call first" in cluster.shell(f"cat {run.run_dir}/errors/*-stacks.txt")
        resumed = cluster.until(
            lambda: next(iter(cluster.events(run, "resumed")), None),
            "it goes on",
            story=lambda: cluster.story(run.run_id),
        )
        # Not to a certain step: on a busy machine the run would be over before it is harmed.
        cluster.wait_step(run, resumed["step"] + 20)
        cluster.run("hpcdl", "cancel", run.run_id)
        assert cluster.wait_state(run.run_id, "CANCELLED", "FAILED")["restarts"] == 1
        links = cluster.events(run, "preflight")[-1]
        assert set(links["links_mib_per_s"]) == set(started["node_list"]) and links["allreduce_mib_per_s"] > 0
    finally:
        cluster.root("c2", "rm -f /usr/local/bin/nvidia-smi")
