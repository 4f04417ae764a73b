"""Whole runs on the real cluster: many nodes, sweeps, shared nodes, failures, nested launches."""

from __future__ import annotations

import shlex

import pytest

from hpcdl.monitor import records
from tests.slurm.cluster import Cluster

# One thread a process: four pretend nodes share two real cores, and threads that wait for each other spin.
TINY = (
    "+experiment=pretrain_tiny",
    "trainer.eval_samples=4",
    "trainer.checkpoint_every=0",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=2",
    "data.seq_len=64",
    "task.sample_prompt=''",
    "cluster.cpus_per_process=1",
)
STEADY = ("optim=sgd", "optim.lr=1e-3", "optim.warmup_steps=0")
"""Rounding isn't amplified: over 1,040 steps one process and two (fsdp) stay within 6e-8. AdamW at 3e-3: 1 %."""
LONG = (*TINY, "trainer.max_steps=20000", "optim.warmup_steps=0")


def test_ddp_across_nodes_gives_the_loss_of_one_process(cluster: Cluster) -> None:
    many = cluster.launch_one(*TINY, "trainer.max_steps=4", "cluster.nodes=2", "cluster.processes_per_node=2")
    one = cluster.launch_one(*TINY, "trainer.max_steps=4", "cluster.nodes=1", "cluster.processes_per_node=1")
    status, _ = cluster.wait_done([many, one])
    assert (status["nodes"], status["world_size"], status["step"], status["exit_code"]) == (2, 4, 4, 0)
    expected = cluster.losses(one)
    assert list(expected) == [1, 2, 3, 4]
    for step, loss in cluster.losses(many).items():
        assert loss == pytest.approx(expected[step], rel=1e-5)
    (started,) = cluster.events(many, "started")
    assert len(set(started["node_list"])) == 2
    logs = cluster.run("hpcdl", "logs", many.run_id).stdout
    assert all(f"[rank {rank}]" in logs for rank in range(4)), logs


def test_every_strategy_across_nodes_has_the_losses_of_ddp(cluster: Cluster) -> None:
    """One array of 2 nodes × 2 processes; a point that can't be is left out, and the others go on."""
    common = (
        *TINY, "trainer.max_steps=6", "trainer.global_batch_size=12", "trainer.micro_batch_size=1",
        "model.shape.num_hidden_layers=4", "trainer.checkpoint_every=3",
    )  # fmt: skip
    runs = cluster.launch(
        *common, "-m", "parallel=ddp,fsdp,tp,pp,cp,hogwild", "cluster.nodes=2", "cluster.processes_per_node=2",
        "cluster.array_parallelism=1",
    )  # fmt: skip
    assert len(runs) == 5, "hogwild shares the memory of one machine"
    assert len({run.array_id for run in runs}) == 1
    for status in cluster.wait_done(runs, limit_s=900):
        assert (status["nodes"], status["world_size"], status["step"], status["exit_code"]) == (2, 4, 6, 0)
    expected = cluster.losses(runs[0])
    for run in runs[1:]:
        assert cluster.losses(run) == pytest.approx(expected, rel=1e-5), cluster.story(run.run_id)
    # What the pipeline had learnt by step 3 goes on under FSDP on three processes.
    more = cluster.launch_one(
        *common, "parallel=fsdp", f"trainer.resume_from={runs[3].run_dir}/checkpoints/step-00000003",
        "cluster.nodes=3", "cluster.processes_per_node=1",
    )  # fmt: skip
    (status,) = cluster.wait_done([more])
    assert (status["world_size"], status["step"], status["exit_code"]) == (3, 6, 0)
    assert cluster.losses(more) == pytest.approx({step: expected[step] for step in (4, 5, 6)}, rel=1e-5)


def test_the_main_job_runs_on_two_nodes(cluster: Cluster) -> None:
    done = cluster.run(
        "hpcdl", "launch", "+experiment=lora_llama", "cluster=slurm_docker", "cluster.nodes=2",
        "cluster.processes_per_node=1", "trainer.max_steps=2", "trainer.eval_samples=4", "task.sample_tokens=4",
        "optim.warmup_steps=0", "wait=true",
        check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr + cluster.story("latest")
    status = cluster.status("latest")
    assert status["state"] == "COMPLETED"
    assert "_0" in status["job_id"], "submitted as an array"
    cluster.shell(f"test -s {status['run_dir']}/adapter/adapter_model.safetensors")
    cluster.shell(f"test -s {status['run_dir']}/loss.png && grep -q perplexity {status['run_dir']}/card.md")
    sampled = {}
    for file in cluster.shell(f"ls {status['run_dir']}/system-*.jsonl").split():
        samples = [records.of_line(line) for line in cluster.lines(file)]
        assert {"agent", "torchrun"} <= {each.role for each in samples[0].processes}, (
            "before the first import"
        )
        (rank,) = {rank.rank for sample in samples for rank in sample.ranks}
        sampled[samples[0].node] = rank
        assert max(rank.rss_bytes or 0 for sample in samples for rank in sample.ranks) > 200e6
        assert any(rank.step is not None for sample in samples for rank in sample.ranks)
    assert len(sampled) == 2 and sorted(sampled.values()) == [0, 1], "each node has written its own rank's"


def test_a_sweep_is_one_array_a_resource_shape_and_returns_at_once(cluster: Cluster) -> None:
    runs = cluster.launch(
        *TINY, "-m", "optim.lr=1e-3,2e-3,3e-3", "cluster.nodes=1,2", "trainer.max_steps=2",
        "cluster.array_parallelism=2",
    )  # fmt: skip
    assert len(runs) == 6
    states = [cluster.status(run.run_id)["state"] for run in runs]
    assert "COMPLETED" not in states[-2:], "the launch returned before the sweep was over"
    arrays = {run.array_id for run in runs}
    assert len(arrays) == 2
    for array in arrays:
        assert "ArrayTaskThrottle=2" in cluster.shell(f"scontrol show job {array}")
    ended = cluster.wait_done(runs, limit_s=600)
    assert sorted(status["nodes"] for status in ended) == [1, 1, 1, 2, 2, 2]
    assert len({status["run_id"] for status in ended}) == 6


def test_two_jobs_share_a_node(cluster: Cluster) -> None:
    shape = ("cluster.nodes=1", "cluster.processes_per_node=2")
    runs = cluster.launch(
        *TINY, *shape, "-m", "seed=1,2", "trainer.max_steps=60", 'cluster.extra=["--nodelist=c1"]'
    )
    ended = cluster.wait_done(runs)
    first, second = ended
    assert first["started"] < second["ended"] and second["started"] < first["ended"], (
        "they ran at the same time"
    )
    assert {cluster.events(run, "started")[0]["node_list"][0] for run in runs} == {"c1"}


def test_a_failing_worker_is_told_in_one_line(cluster: Cluster) -> None:
    cluster.shell("echo 'too little text' > small.txt")
    run = cluster.launch_one(
        *TINY, "data=text", f"data.paths=[{cluster.home}/small.txt]", "cluster.processes_per_node=2"
    )
    status = cluster.wait_state(run.run_id, "FAILED", "COMPLETED")
    assert status["state"] == "FAILED" and status["exit_code"] not in (0, None)
    assert "rank" in status["reason"]
    detail = cluster.run("hpcdl", "status", run.run_id).stdout
    assert "data=text has 1 document" in detail and "Traceback" not in detail
    job = cluster.until(lambda: _ended_job(cluster, run.job_id), "the job's end in Slurm's books")
    assert "JobState=FAILED" in job and "ExitCode=0:0" not in job
    waited = cluster.run(
        "hpcdl", "launch", "cluster=slurm_docker", *TINY, "data=text", f"data.paths=[{cluster.home}/small.txt]",
        "cluster.processes_per_node=2", "wait=true", check=False,
    )  # fmt: skip
    assert waited.returncode == 1, waited.stdout + waited.stderr


def _ended_job(cluster: Cluster, job_id: str) -> str | None:
    text = cluster.shell(f"scontrol show job {job_id}")
    return text if "JobState=RUNNING" not in text and "JobState=COMPLETING" not in text else None


def test_an_edit_after_submission_changes_nothing(cluster: Cluster) -> None:
    cluster.shell(
        "mkdir -p conf/experiment; printf '# @package _global_\\ndefaults:\\n  - pretrain_tiny\\n  - _self_\\n"
        "trainer:\\n  max_steps: 3\\n' > conf/experiment/mine.yaml"
    )
    run = cluster.launch_one("--config-dir", "conf", "+experiment=mine", "cluster.extra=[--hold]")
    cluster.shell("sed -i s/3/999/ conf/experiment/mine.yaml")
    assert cluster.status(run.run_id)["state"] == "PENDING"
    cluster.shell(f"scontrol release {run.array_id}")
    (status,) = cluster.wait_done([run])
    assert (status["step"], status["max_steps"]) == (3, 3)


def test_launching_from_inside_a_job(cluster: Cluster) -> None:
    """Fact 6: memory is asked for in another way outside than inside, both ways about."""
    ways = (("--mem=500", 'cluster.extra=["--mem-per-cpu=900"]'), ("--mem-per-cpu=300", "cluster.mem_gb=1.5"))
    for number, (outside, inside) in enumerate(ways):
        words = (
            *TINY,
            f"seed={number}",
            "trainer.max_steps=2",
            "optim.warmup_steps=0",
            inside,
            "parsable=true",
        )
        inner = f"{shlex.join(['hpcdl', 'launch', 'cluster=slurm_docker', *words])} > inner{number}.txt"
        cluster.shell(f"sbatch {outside} --cpus-per-task=2 --wrap {shlex.quote(inner)}")
    for number in range(len(ways)):
        done = f"test -s inner{number}.txt && cut -f1 inner{number}.txt"
        run_id = cluster.until(
            lambda line=done: cluster.shell(line, check=False).strip() or None,  # type: ignore[misc]
            "a launch from inside",
            story=lambda: cluster.shell("squeue; tail -n 20 slurm-*.out", check=False),
        )
        assert cluster.wait_state(run_id, "COMPLETED", "FAILED")["state"] == "COMPLETED", cluster.story(
            run_id
        )


def test_the_template_works_by_hand(cluster: Cluster) -> None:
    cluster.shell("sbatch --wait /hpcdl/slurm/torchrun.sbatch +experiment=pretrain_tiny trainer.max_steps=2")
    status = cluster.status("latest")
    assert (status["state"], status["step"]) == ("COMPLETED", 2), cluster.story("latest")


def test_dry_run_prints_what_is_submitted(cluster: Cluster) -> None:
    words = ("cluster=slurm_docker", *TINY, "trainer.max_steps=2", "cluster.extra=[--hold]")
    dry = cluster.run("hpcdl", "launch", *words, "dry_run=true").stdout
    assert cluster.shell("ls -A").split() == [], "a dry run changes nothing"
    run = cluster.launch_one(*words[1:])
    sent = cluster.shell(f"cat {run.run_dir}/job.sh")
    body = [
        line for line in sent.splitlines() if line and "hpcdl:" not in line and ".submissions" not in line
    ]
    missing = [line for line in body if line not in dry]
    assert not missing
