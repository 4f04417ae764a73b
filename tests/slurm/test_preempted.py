"""Jobs that must end early on the real cluster: preempted, out of time, told to stop; and their exit codes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, Launched
from tests.slurm.harm import come_near_the_limit
from tests.slurm.test_runs import LONG, TINY

AGAIN_S = 20.0
"""Training goes on so soon after the way is free."""


def test_preempted_and_then_out_of_time_it_goes_on_bit_for_bit(cluster: Cluster) -> None:
    """A task of an array: its sibling, which nobody disturbs, has the same losses."""
    words = (
        *LONG, "seed=5", "cluster.nodes=2", "cluster.partition=low", "cluster.mem_gb=3.5",
        "cluster.teardown=['echo $SLURM_JOB_ID >> teardown.txt']",
    )  # fmt: skip
    disturbed, calm = cluster.launch(*words, "-m", "trainer.keep_last=2,3")
    assert disturbed.array_id == calm.array_id
    cluster.wait_step(disturbed, 5)
    nodes = ",".join(cluster.events(disturbed, "started")[0]["node_list"])
    short = cluster.shell(f"sbatch --parsable -p high -w {nodes} -N2 --exclusive --wrap 'sleep 3'").strip()
    preempted = wait_event(cluster, disturbed, "requeued", 1)
    assert preempted["way"] == "slurm" and "checkpoint saved at step" in preempted["reason"]
    free = ended_at(cluster, short)
    again = wait_event(cluster, disturbed, "started", 2)
    assert seconds(free, again["time"]) < AGAIN_S, cluster.story(disturbed.run_id)
    assert again["job_id"] == disturbed.job_id

    resumed = wait_event(cluster, disturbed, "resumed", 1)
    cluster.wait_step(disturbed, resumed["step"] + 3)
    come_near_the_limit(cluster, disturbed.job_id)
    late = wait_event(cluster, disturbed, "requeued", 2)
    assert late["way"] == "successor" and late["continues"] == disturbed.job_id
    assert late["reason"].startswith("stopped by SIGUSR2; checkpoint saved at step"), late
    again = wait_event(cluster, disturbed, "started", 3)
    assert again["job_id"] == late["job_id"] != disturbed.job_id
    assert seconds(late["time"], again["time"]) < AGAIN_S, cluster.story(disturbed.run_id)
    cluster.until(  # Slurm is still ending the one when the other has begun
        lambda: "ExitCode=75:0" in cluster.shell(f"scontrol show job {disturbed.job_id}") or None,
        "the exit code of the job that has a successor",
        story=lambda: cluster.shell(f"scontrol show job {disturbed.job_id}"),
    )
    status = cluster.status(disturbed.job_id)
    assert status["run_id"] == disturbed.run_id, "the old job's id still names it"
    assert (status["requeues"], status["job_id"]) == (2, late["job_id"])

    resumed = wait_event(cluster, disturbed, "resumed", 2)
    for run in (disturbed, calm):
        cluster.wait_step(run, resumed["step"] + 3)
    unharmed = cluster.status(calm.run_id)
    assert (unharmed["requeues"], unharmed["job_id"]) == (0, calm.job_id)
    assert len(cluster.events(calm, "started")) == 1
    assert no_step_was_lost(cluster, disturbed) == 2
    losses, expected = cluster.losses(disturbed), cluster.losses(calm)
    common = range(1, min(max(losses), max(expected)) + 1)
    assert len(common) > resumed["step"]
    assert [losses[step] for step in common] == [expected[step] for step in common], "bit for bit"
    assert len(cluster.shell("cat teardown.txt").splitlines()) == 2, "once for each end of a job"


def test_exit_codes_go_all_the_way(cluster: Cluster) -> None:
    """A worker's own code, with setup and teardown lines around it; and a setup line that fails."""
    lines = (
        "cluster.setup=['echo set up > setup.txt']",
        "cluster.teardown=['mv setup.txt down.txt','false']",
    )
    killed = cluster.launch_one(
        *LONG, *lines, "cluster.max_restarts=0", "cluster.max_requeues=0", 'cluster.extra=["--nodelist=c3"]'
    )
    broken = cluster.launch_one(
        *TINY, "seed=77", "cluster.setup=['echo begins','ls /no/such/place']", "cluster.teardown=['echo over']",
    )  # fmt: skip
    status = cluster.wait_state(broken.run_id, "FAILED", "COMPLETED", "UNKNOWN")
    assert status["state"] == "FAILED" and status["exit_code"] == 2
    assert "cluster.setup failed with code 2 at: ls /no/such/place; nothing was trained" in status["reason"]
    assert "over" in cluster.run("hpcdl", "logs", broken.run_id).stdout

    cluster.wait_step(killed, 2)
    cluster.root("c3", "pkill -9 -f '[-]u -m hpcdl.worker.main'")  # the worker, not its torchrun
    status = cluster.wait_state(killed.run_id, "FAILED", "COMPLETED", "OUT_OF_MEMORY")
    assert status["exit_code"] == 137, status
    assert "SIGKILL" in status["reason"]
    job = cluster.until(lambda: over(cluster, killed.job_id), "the job's end in Slurm's books")
    assert "ExitCode=137:0" in job, job
    assert cluster.shell("cat down.txt") == "set up\n"
    assert "cluster.teardown failed with code 1 at: false" in cluster.shell(
        "cat runs/.submissions/*/slurm-*.out"
    )


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["--signal=TERM", "--batch --signal=USR2", "--batch --signal=TERM"])
def test_a_signal_of_scancels(cluster: Cluster, signal: str) -> None:
    run = cluster.launch_one(
        *TINY, "trainer.max_steps=60", "optim.warmup_steps=10", "cluster.requeue=requeue"
    )
    cluster.wait_step(run, 10)
    cluster.shell(f"scancel {signal} {run.job_id}")
    assert wait_event(cluster, run, "requeued", 1)["way"] == "requeue"
    (status,) = cluster.wait_done([run])  # the polls of the status ask for the start
    assert (status["requeues"], status["job_id"]) == (1, run.job_id)
    (hastened,) = cluster.events(run, "hastened")
    again = cluster.events(run, "started")[1]
    assert seconds(hastened["time"], again["time"]) < AGAIN_S
    assert no_step_was_lost(cluster, run) == 1


@pytest.mark.slow
def test_a_requeue_by_the_administrator(cluster: Cluster) -> None:
    words = (*TINY, "trainer.max_steps=100", "optim.warmup_steps=10", "seed=6")
    disturbed, calm = cluster.launch(*words, "-m", "trainer.keep_last=2,3")
    cluster.wait_step(disturbed, 15)
    cluster.shell(f"scontrol requeue {disturbed.job_id}")
    assert wait_event(cluster, disturbed, "requeued", 1)["way"] == "slurm"
    follower = cluster.run("hpcdl", "follow", disturbed.run_id)  # the second to look at it
    assert "requeued job asked to start now" in follower.stdout
    cluster.wait_done([disturbed, calm])
    assert no_step_was_lost(cluster, disturbed) == 1
    assert cluster.losses(disturbed) == cluster.losses(calm)


@pytest.fixture
def grace(cluster: Cluster) -> Iterator[None]:
    """A cluster whose preempted jobs get no signal of their own, but SIGTERM and a grace time (fact 17)."""
    switch = "sed -i 's/^{}SlurmctldParameters=preempt/{}SlurmctldParameters=preempt/' /etc/slurm/slurm.conf"
    cluster.root("slurmctld", f"{switch.format('', '#')}; scontrol reconfigure")
    cluster.root("slurmctld", "scontrol update PartitionName=low GraceTime=90")
    yield
    cluster.root("slurmctld", f"{switch.format('#', '')}; scontrol reconfigure")
    cluster.root("slurmctld", "scontrol update PartitionName=low GraceTime=0")


@pytest.mark.slow
@pytest.mark.usefixtures("grace")
def test_a_grace_time_is_enough_for_a_save_of_41_s(cluster: Cluster) -> None:
    """SIGTERM comes with the preemption; torchrun would kill its workers 30 s later, in the middle of the save."""
    slow_disk(cluster, 41)
    run = cluster.launch_one(
        *TINY, "trainer.max_steps=60", "optim.warmup_steps=10", "cluster.partition=low",
        f"cluster.env.PYTHONPATH={cluster.home}/slow",
    )  # fmt: skip
    cluster.wait_step(run, 10)
    node = cluster.events(run, "started")[0]["node_list"][0]
    cluster.shell(f"sbatch -p high -w {node} --exclusive --wrap 'sleep 1'")
    requeued = wait_event(cluster, run, "requeued", 1)
    stopping = cluster.events(run, "stopping")[0]
    assert seconds(stopping["time"], requeued["time"]) > 40
    cluster.shell("rm slow/sitecustomize.py")
    cluster.wait_done([run])
    assert no_step_was_lost(cluster, run) == 1


@pytest.mark.slow
def test_preempted_for_good_it_goes_on_all_the_same(cluster: Cluster) -> None:
    """PreemptMode=CANCEL: Slurm itself would let it end there."""
    cluster.root("slurmctld", "scontrol update PartitionName=low PreemptMode=CANCEL")
    try:
        run = cluster.launch_one(
            *TINY, "trainer.max_steps=60", "optim.warmup_steps=10", "cluster.partition=low"
        )
        cluster.wait_step(run, 10)
        node = cluster.events(run, "started")[0]["node_list"][0]
        cluster.shell(f"sbatch -p high -w {node} --exclusive --wrap 'sleep 1'")
        requeued = wait_event(cluster, run, "requeued", 1)
        assert (requeued["way"], requeued["kind"]) == ("successor", "preempted")
        cluster.wait_done([run])
        assert no_step_was_lost(cluster, run) == 1
    finally:
        cluster.root("slurmctld", "scontrol update PartitionName=low PreemptMode=REQUEUE")


def slow_disk(cluster: Cluster, delay_s: int) -> None:
    """The first file of a checkpoint that is brought to the disk takes this long."""
    cluster.shell(
        f"""mkdir slow; cat > slow/sitecustomize.py <<'END'
import os, time
sync, slept = os.fsync, []
def fsync(file):
    number = file if isinstance(file, int) else file.fileno()
    if 'step-' in os.readlink(f'/proc/self/fd/{{number}}') and not slept:
        slept.append(time.sleep({delay_s}))
    sync(file)
os.fsync = fsync
END"""
    )


def wait_event(cluster: Cluster, run: Launched, kind: str, number: int) -> dict[str, Any]:
    """The run's `number`th event of a kind. Each look is a user's: `hpcdl status`."""

    def look() -> dict[str, Any] | None:
        status = cluster.status(run.run_id)
        assert status["state"] in ("PENDING", "RUNNING", "COMPLETED"), cluster.story(run.run_id)
        found = cluster.events(run, kind)
        return found[number - 1] if len(found) >= number else None

    return cluster.until(look, f"{kind}, {number}", story=lambda: cluster.story(run.run_id))


def no_step_was_lost(cluster: Cluster, run: Launched) -> int:
    """Each time the run went on from the very step that it had stopped after; how many times that was."""
    stopped = [event["step"] for event in cluster.events(run, "stopping")]
    assert [event["step"] for event in cluster.events(run, "resumed")] == stopped
    return len(stopped)


def over(cluster: Cluster, job_id: str) -> str | None:
    text = cluster.shell(f"scontrol show job {job_id}")
    return None if re.search(r"JobState=(PENDING|RUNNING|COMPLETING)", text) else text


def ended_at(cluster: Cluster, job_id: str) -> str:
    """When a job was over (UTC, ISO 8601)."""

    def look() -> str | None:
        text = cluster.shell(f"TZ=UTC scontrol show job {job_id}")
        found = re.search(r"JobState=COMPLETED.*EndTime=(\S+)", text, re.DOTALL)
        return f"{found.group(1)}+00:00" if found else None

    return cluster.until(look, f"the end of job {job_id}")


def seconds(earlier: str, later: str) -> float:
    return (datetime.fromisoformat(later).astimezone(UTC) - datetime.fromisoformat(earlier)).total_seconds()
