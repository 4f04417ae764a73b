"""Runs that are cancelled, killed or launched again."""

from __future__ import annotations

from tests.slurm.cluster import Cluster
from tests.slurm.test_runs import LONG, TINY


def test_cancel_pending_and_running(cluster: Cluster) -> None:
    held = cluster.launch_one(*TINY, "cluster.extra=[--hold]")
    doomed, sibling = cluster.launch(*LONG, "-m", "seed=11,12")
    cluster.run("hpcdl", "cancel", held.run_id)
    assert cluster.status(held.run_id)["state"] == "CANCELLED"
    cluster.wait_step(doomed, 3)
    cluster.run("hpcdl", "cancel", doomed.job_id)
    status = cluster.wait_state(doomed.run_id, "CANCELLED")
    assert status["step"] >= 3 and status["ended"]
    cluster.shell(f"ls -d {doomed.run_dir}/checkpoints/step-*"), "it saved before it stopped"
    assert cluster.status(sibling.run_id)["state"] in ("PENDING", "RUNNING"), "its sibling is untouched"
    cluster.wait_step(sibling, 3)
    cluster.run("hpcdl", "cancel", sibling.run_id)
    assert cluster.wait_state(sibling.run_id, "CANCELLED")["state"] == "CANCELLED"
    logs = cluster.run("hpcdl", "logs", held.run_id, check=False)
    assert "cancelled" in (logs.stdout + logs.stderr).lower()


def test_launching_again_finds_the_run(cluster: Cluster) -> None:
    words = (*TINY, "trainer.max_steps=2")
    first = cluster.launch_one(*words)
    second = cluster.launch_one(*words)
    assert second == first, "pending or running: said, not submitted again"
    cluster.wait_done([first])
    assert cluster.launch_one(*words).run_id == first.run_id
    assert len(cluster.events(first, "submitted")) == 1
    forced = cluster.launch_one(*words, "force=true")
    assert forced.run_id != first.run_id
    cluster.wait_done([forced])
