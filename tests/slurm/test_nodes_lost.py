"""Nodes, agents and workers lost under real runs: containers killed or cut off, processes killed.

What a container can't show: a cut-off node goes on writing to the shared disk, since that is a volume of the machine
all containers run on, and no network file system. So it is the harder case for `running_try` (hpcdl.runs.fence).
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, Launched
from tests.slurm.harm import cut_off, kill_agent, kill_worker, killed
from tests.slurm.test_runs import STEADY, TINY

SHORT = (*TINY, "trainer.checkpoint_every=20", "trainer.max_steps=400", "optim.warmup_steps=0")
TWO_NODES = ("cluster.nodes=2", "cluster.processes_per_node=1")
ONE_NODE = ("cluster.nodes=1", "cluster.processes_per_node=2")


def event(cluster: Cluster, run: Launched, kind: str, number: int = 1) -> dict[str, Any]:
    """The run's `number`th event of a kind, as soon as it is there."""

    def there() -> dict[str, Any] | None:
        found = cluster.events(run, kind)
        return found[number - 1] if len(found) >= number else None

    return cluster.until(there, f"{kind} of {run.run_id}", story=lambda: cluster.story(run.run_id))


def wait_given_up(cluster: Cluster, run: Launched) -> None:
    """Slurm calls the node down (SlurmdTimeout) and puts the job back. Its controller may be slow to answer then."""

    def back() -> bool | None:
        job = cluster.shell(f"scontrol show job {run.job_id}", check=False)
        return True if "Restarts=1" in job and "JobState=PENDING" in job else None

    cluster.until(back, "the job is back in the queue", story=lambda: cluster.story(run.run_id))


def seconds(first: dict[str, Any], then: dict[str, Any]) -> float:
    """Between two events."""
    return (datetime.fromisoformat(then["time"]) - datetime.fromisoformat(first["time"])).total_seconds()


def tries(cluster: Cluster, run: Launched) -> list[str]:
    return [each["try"] for each in cluster.events(run, "started")]


def on_two_nodes(cluster: Cluster, *words: str) -> tuple[Launched, Launched, str, str]:
    """An undisturbed run that is over, the same one under way, and its nodes, the first one first."""
    calm = cluster.launch_one(*SHORT, *TWO_NODES, *words)
    cluster.wait_done([calm])
    run = cluster.launch_one(*SHORT, *TWO_NODES, *words, "trainer.keep_last=3")
    cluster.wait_step(run, 25)
    head, other = event(cluster, run, "started")["node_list"]
    return calm, run, head, other


def test_a_node_an_agent_and_a_worker_are_lost_and_no_loss_changes(cluster: Cluster) -> None:
    # As long as it takes: on a machine that is busy, 400 steps may be over before the second harm is done.
    endless = (*SHORT, *ONE_NODE, "optim.schedule=constant", "trainer.max_steps=20000")
    doomed = cluster.launch_one(*SHORT, *TWO_NODES, "optim.schedule=constant")
    calm = cluster.launch_one(*endless, 'cluster.extra=["--nodelist=c3"]')
    shaken = cluster.launch_one(*endless, "trainer.keep_last=3", 'cluster.extra=["--nodelist=c4"]')
    head, other = event(cluster, doomed, "started")["node_list"]
    assert {head, other} == {"c1", "c2"}
    cluster.wait_step(doomed, 25)
    with killed(cluster, other):
        cluster.wait_step(shaken, 25)
        kill_worker(cluster, shaken, "c4")
        first = event(cluster, shaken, "restarting")
        assert (first["kind"], first["in_place"]) == ("killed", "torchrun")
        event(cluster, shaken, "resumed")
        kill_agent(cluster, shaken, "c4")
        second = event(cluster, shaken, "restarting", 2)
        assert (second["kind"], second["in_place"], second["nodes"]) == ("killed", "job", ["c4"])
        (ended,) = cluster.wait_done([doomed])
    resumed = event(cluster, shaken, "resumed", 2)
    # Each is let run until it has what the others are compared by.
    cluster.wait_step(shaken, resumed["step"] + 20)
    cluster.run("hpcdl", "cancel", shaken.run_id)
    cluster.wait_step(calm, max(400, resumed["step"] + 20))
    cluster.run("hpcdl", "cancel", calm.run_id)
    restarted, _ = (cluster.wait_state(run.run_id, "CANCELLED") for run in (shaken, calm))
    requeued = event(cluster, doomed, "requeued")
    assert (requeued["node"], requeued["exclude"], requeued["kind"]) == (other, [other], "node")
    assert requeued["reason"].startswith("NodeLost: the node is lost: ")
    assert other not in event(cluster, doomed, "started", 2)["node_list"]
    assert tries(cluster, doomed) == ["0.0", "0.1"]
    assert seconds(requeued, event(cluster, doomed, "started", 2)) < 60, "it need not wait for SlurmdTimeout"
    assert (ended["requeues"], ended["restarts"]) == (1, 0)
    assert (restarted["requeues"], restarted["restarts"]) == (0, 2)
    assert tries(cluster, shaken) == ["0.0", "0.0.1"]
    expected = cluster.losses(calm)
    for run in (doomed, shaken):
        assert all(each["step"] > 0 for each in cluster.events(run, "resumed")), "from a checkpoint"
        losses = cluster.losses(run)
        common = range(1, min(max(losses), max(expected)) + 1)
        assert len(common) > max(each["step"] for each in cluster.events(run, "resumed"))
        assert [losses[step] for step in common] == [expected[step] for step in common], "bit for bit"


@pytest.mark.slow
def test_a_cut_off_node_is_found_by_its_silence(cluster: Cluster) -> None:
    calm, run, head, other = on_two_nodes(cluster)
    with cut_off(cluster, other):
        requeued = event(cluster, run, "requeued")
        assert (requeued["node"], requeued["exclude"]) == (other, [other])
        assert "no word from its agent for" in requeued["reason"]
        cut = cluster.run("bash", "-c", f"cat {run.run_dir}/logs/{other}-try0.0.log").stdout
        cluster.wait_done([run])
        assert f"node {head} is lost" in cut, "the node that is cut off ends its own workers"
        assert not cluster.root(other, "pgrep -f hpcdl.worker.main").strip()
    assert cluster.losses(run) == cluster.losses(calm)


@pytest.mark.slow
def test_a_cut_off_first_node_writes_nothing_beside_the_new_try(cluster: Cluster) -> None:
    """One node: nobody misses it but Slurm. It trains on, and may save, until the new try has begun."""
    words = (*SHORT, *ONE_NODE, "trainer.max_steps=20000", "monitor=none")
    run = cluster.launch_one(*words)
    cluster.wait_step(run, 25)
    (node,) = event(cluster, run, "started")["node_list"]
    with cut_off(cluster, node):
        wait_given_up(cluster, run)
        assert cluster.root(node, "pgrep -f hpcdl.worker.main").strip(), "its workers go on"
        cluster.status(run.run_id)
        cluster.shell(f"scontrol update jobid={run.job_id} StartTime=now", check=False)
        started = event(cluster, run, "started", 2)
        assert node not in started["node_list"]
        lost = event(cluster, run, "lost")
        assert lost["down"] == [node]
        cluster.until(
            lambda: True if not cluster.root(node, "pgrep -f hpcdl.launch.job").strip() else None,
            "the old try's agent has ended itself",
        )
        log = cluster.shell(f"cat {run.run_dir}/logs/{node}-try0.0.log")
        assert "try 0.1 has taken the run over from try 0.0" in log
        resumed = event(cluster, run, "resumed")
        cluster.until(
            lambda: True if cluster.status(run.run_id)["step"] > resumed["step"] + 20 else None, "new steps"
        )
        steps = [line["step"] for line in cluster.lines(f"{run.run_dir}/metrics.jsonl") if "loss" in line]
        assert steps == sorted(set(steps)), "one writer"
        cluster.run("hpcdl", "cancel", run.run_id)
        cluster.wait_state(run.run_id, "CANCELLED")


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_nodes(cluster: Cluster) -> None:
    words = (
        *SHORT, *STEADY, "cluster.processes_per_node=1", "trainer.global_batch_size=12", "trainer.micro_batch_size=1",
    )  # fmt: skip
    run = cluster.launch_one(*words, "cluster.nodes=3", "cluster.min_nodes=1")
    calm = cluster.launch_one(*words, "cluster.nodes=1")
    cluster.wait_step(run, 25)
    nodes = event(cluster, run, "started")["node_list"]
    with killed(cluster, nodes[2]):
        restarting = event(cluster, run, "restarting")
        assert (restarting["node"], restarting["nodes"]) == (nodes[2], nodes[:2])
        status, _ = cluster.wait_done([run, calm])
    assert (status["nodes"], status["world_size"], status["restarts"], status["requeues"]) == (2, 2, 1, 0)
    (resumed,) = cluster.events(run, "resumed")
    assert resumed["step"] > 0, "from a checkpoint"
    assert cluster.losses(run) == pytest.approx(cluster.losses(calm), rel=1e-5), "on three ranks, then on two"


@pytest.mark.slow
@pytest.mark.parametrize("fewest", [(), ("cluster.min_nodes=1",)], ids=["all_nodes", "fewer_nodes"])
def test_the_first_nodes_death_is_the_next_ones_to_tell(cluster: Cluster, fewest: tuple[str, ...]) -> None:
    """Slurm would queue the job again after SlurmdTimeout; one that may go on with fewer nodes it never would."""
    calm, run, head, other = on_two_nodes(cluster, *fewest)
    with killed(cluster, head):
        requeued = event(cluster, run, "requeued")
        assert (requeued["node"], requeued["exclude"], requeued["way"]) == (head, [head], "successor")
        log = cluster.shell(f"cat {run.run_dir}/logs/{other}-try0.0.log")
        assert f"node {head} is lost" in log
        started = event(cluster, run, "started", 2)
        assert head not in started["node_list"]
        assert seconds(requeued, started) < 60, "it need not wait for SlurmdTimeout"
        (status,) = cluster.wait_done([run])
    assert status["requeues"] == 1
    if len(started["node_list"]) == 2:
        assert cluster.losses(run) == cluster.losses(calm)


@pytest.mark.slow
def test_a_cut_off_first_node_that_would_go_on_alone_is_passed_over(cluster: Cluster) -> None:
    """It takes the others for lost, and reaches Slurm no more than they reach it."""
    calm, run, head, _ = on_two_nodes(cluster, *STEADY, "cluster.min_nodes=1")
    with cut_off(cluster, head):
        requeued = event(cluster, run, "requeued")
        assert (requeued["node"], requeued["exclude"]) == (head, [head])
        started = event(cluster, run, "started", 2)
        assert head not in started["node_list"]
        cluster.wait_done([run])
    assert cluster.losses(run) == pytest.approx(cluster.losses(calm), rel=1e-5)
