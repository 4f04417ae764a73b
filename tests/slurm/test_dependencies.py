"""Runs that wait for others, in Slurm's own queue."""

from __future__ import annotations

import pytest

from tests.slurm.cluster import Cluster, Launched
from tests.slurm.test_runs import LONG, TINY

SHORT = (*TINY, "trainer.max_steps=1", "trainer.eval_samples=1")


def chain(cluster: Cluster, *first: str) -> tuple[Launched, Launched, Launched]:
    """train → eval → export, the first one held until all are in the queue."""
    train = cluster.launch_one(*SHORT, "name=train", "cluster.extra=[--hold]", *first)
    evaluation = cluster.launch_one(*SHORT, "name=eval", f"after={train.run_id}")
    export = cluster.launch_one(*SHORT, "name=export", "after=latest")
    return train, evaluation, export


def test_a_chain_fails_as_a_whole_and_is_taken_up_again(cluster: Cluster) -> None:
    """Fact 9: dependents of a failed run are cancelled, with its name; resubmitted, all three run in their order."""
    train, evaluation, export = chain(cluster, "cluster.setup=['exit 3']")
    waits = cluster.status(evaluation.run_id)
    assert waits["reason"] == f"Dependency: waits for {train.run_id} (train), PENDING", waits
    cluster.shell(f"scontrol release {train.array_id}")
    status = cluster.wait_state(train.run_id, "FAILED")
    assert status["exit_code"] == 3
    for run, parent, name in ((evaluation, train, "train"), (export, evaluation, "eval")):
        status = cluster.wait_state(run.run_id, "CANCELLED", limit_s=60)
        assert f"{parent.run_id} ({name}), which it waited for, " in status["reason"], status
    refused = cluster.run(
        "hpcdl", "launch", "cluster=slurm_docker", *SHORT, f"after={train.run_id}", check=False
    )
    assert refused.returncode == 2 and "is FAILED and will not succeed" in refused.stderr

    # The same ids, less what was wrong; no hold, no setup.
    words = [train.run_id, evaluation.run_id, export.run_id, "--only", "failed,cancelled", "cluster.setup=[]"]
    cluster.run("hpcdl", "resubmit", *words, "cluster.extra=[]")
    runs = cluster.wait_done([train, evaluation, export])
    # To the second: a start that Slurm tells has no fraction of it.
    (_, first), (second, until), (third, _) = [(run["started"][:19], run["ended"][:19]) for run in runs]
    assert first <= second and until <= third, "one after the other"
    late = cluster.launch_one(
        *SHORT, "cluster.extra=[--hold]", "seed=7", f"after={train.run_id},{export.run_id}"
    )
    assert "--dependency" not in cluster.shell(f"cat {late.run_dir}/job.sh"), "both are done"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["requeue", "successor"])
def test_a_dependent_waits_for_a_run_that_goes_on(way: str, cluster: Cluster) -> None:
    """Its parent is stopped and goes on, in the same job or in another; the dependent starts after its real end."""
    words = (*LONG, f"cluster.requeue={way}", "trainer.max_steps=300", "name=train")
    train = cluster.launch_one(*words)
    child = cluster.launch_one(*SHORT, "name=eval", f"after={train.run_id}")
    cluster.wait_step(train, 3)
    cluster.shell(f"scancel --signal=USR2 {train.job_id}")
    cluster.until(
        lambda: True if cluster.events(train, "requeued") else None,
        "it goes on",
        story=lambda: cluster.story(train.run_id),
    )
    first, second = cluster.wait_done([train, child])
    # Slurm's own times are whole seconds, and say when it began a second that was under way.
    assert first["requeues"] == 1 and first["ended"][:19] <= second["started"][:19]


@pytest.mark.slow
def test_a_dependent_of_a_sweep(cluster: Cluster) -> None:
    """Every point of the second launch waits for all of the first, of which one is cancelled while pending.

    Such a task leaves no record, and Slurm starts those that wait for it; they see for themselves.
    """
    trains = cluster.launch(*SHORT, "name=train", "cluster.extra=[--hold]", "-m", "seed=1,2")
    children = cluster.launch(*SHORT, "name=eval", "-m", "seed=1,2", f"after={trains[0].array_id}")
    cluster.shell(f"scancel {trains[1].job_id}")
    cluster.shell(f"scontrol release {trains[0].array_id}", check=False)
    for child in children:
        status = cluster.wait_state(child.run_id, "CANCELLED", limit_s=60)
        assert f"{trains[1].run_id} (train), which it waited for" in status["reason"], status


@pytest.mark.slow
def test_a_sweep_longer_than_an_array_may_be(cluster: Cluster) -> None:
    """Facts 5 and 19: MaxArraySize=1001 bounds the index; two sbatch, no pickle."""
    runs = cluster.launch(
        *SHORT, "cluster.extra=[--hold]", "cluster.array_parallelism=7", "-m", "seed=range(0,1002)"
    )
    arrays = sorted({run.array_id for run in runs}, key=int)
    assert len(runs) == 1002 and len(arrays) == 2
    shown = cluster.shell(f"SLURM_BITSTR_LEN=0 squeue -h -j {','.join(arrays)} -o '%F %K'")
    assert sorted(shown.split()) == sorted([arrays[0], "0-500%4", arrays[1], "0-500%3"])
    assert not cluster.shell("find runs/.submissions -name '*.pkl'")
    assert cluster.status(runs[-1].run_id)["job_id"] == f"{arrays[1]}_500"
