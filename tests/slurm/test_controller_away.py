"""The controller or the database is away: stopped by a signal, killed, restarted, forgetful."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import CLUSTER, Cluster, Launched
from tests.slurm.harm import daemon
from tests.slurm.test_runs import TINY

HELD = (*TINY, "cluster.extra=[--hold]")
"""A job that never starts: what is shown here is what the login node does."""
WRAPPER = """\
#!/bin/bash
# sbatch of which the answer is lost: the controller has taken the job, and the connection breaks.
[[ -e {home}/lost ]] && exec /usr/bin/sbatch "$@"
touch {home}/lost
/usr/bin/sbatch "$@" >/dev/null
{then}
"""


@pytest.fixture
def without_database(cluster: Cluster) -> Iterator[None]:
    """slurmdbd is stopped meanwhile."""
    daemon("stop", "slurmdbd")
    yield
    daemon("start", "slurmdbd")


@pytest.fixture
def controller(cluster: Cluster) -> Iterator[None]:
    """Whatever a test does to slurmctld, it answers again afterwards."""
    yield
    cluster.root("slurmctld", "pkill -CONT -x slurmctld; rm -f /run/hold")
    cluster.until(
        lambda: True if "is UP" in cluster.shell("scontrol ping", check=False) else None, "slurmctld"
    )


def jobs(cluster: Cluster) -> list[str]:
    """Ids of this user's jobs in the queue that hpcdl has submitted."""
    lines = cluster.shell("squeue -h -u student -t PENDING,RUNNING,COMPLETING -o '%F %k'").splitlines()
    return [line.split()[0] for line in lines if "hpcdl:" in line]


def launching(cluster: Cluster, *words: str, path: str = "", patience_s: float = 60) -> subprocess.Popen[str]:
    """`hpcdl launch …` in the background."""
    line = f"export HPCDL_SLURM_PATIENCE_S={patience_s} PATH={path}$PATH; exec hpcdl launch cluster=slurm_docker "
    command = [
        CLUSTER,
        "run",
        "--cwd",
        cluster.home,
        "bash",
        "-c",
        line + '"$@"',
        "bash",
        *words,
        "parsable=true",
    ]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def the_run(out: str) -> Launched:
    (line,) = [line for line in out.splitlines() if line.count("\t") == 2]
    return Launched(*line.split("\t"))


@pytest.mark.slow
def test_a_controller_that_is_frozen_takes_a_job_once(cluster: Cluster, controller: None) -> None:
    """sbatch's request lies in the socket of a stopped slurmctld, which takes it when it goes on."""
    known = cluster.launch_one(*HELD, "seed=1")
    cluster.root("slurmctld", "pkill -STOP -x slurmctld")
    process = launching(cluster, *HELD, "seed=2")
    assert process.stderr is not None
    first = process.stderr.readline()
    assert "no answer: " in first and "looking whether Slurm has taken the job" in first, first
    said = cluster.run("hpcdl", "status", known.run_id).stdout
    assert "UNKNOWN" in said and "unknown since" in said and "PENDING when last known" in said, said
    cluster.root("slurmctld", "pkill -CONT -x slurmctld")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    run = the_run(out)
    assert cluster.wait_state(run.run_id, "PENDING")["job_id"] == run.job_id
    assert sorted(jobs(cluster)) == sorted([known.array_id, run.array_id]), "never doubled"
    assert cluster.status(known.run_id)["state"] == "PENDING"


@pytest.mark.parametrize(
    "then",
    [
        "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1",
        "kill -9 $(ps -o ppid= -p $PPID)",
    ],
    ids=["answer", "launcher"],
)
def test_a_lost_answer_is_found_by_the_token(then: str, cluster: Cluster) -> None:
    """Of the two, the second kills the launcher itself at that moment."""
    text = WRAPPER.format(home=cluster.home, then=then)
    cluster.shell(f"mkdir bin; cat >bin/sbatch <<'END'\n{text}END\nchmod +x bin/sbatch")
    process = launching(cluster, *HELD, path=f"{cluster.home}/bin:")
    out, err = process.communicate(timeout=120)
    (job_id,) = jobs(cluster)
    if process.returncode == 0:
        assert the_run(out).array_id == job_id and "has taken the job all the same" in err
    status = cluster.status("latest")
    assert (status["state"], status["job_id"]) == ("PENDING", f"{job_id}_0")
    again = cluster.launch_one(*HELD)
    assert (again.run_id, again.array_id) == (status["run_id"], job_id), "found, not submitted again"
    assert jobs(cluster) == [job_id]


def test_without_controller_and_database(cluster: Cluster, without_database: None, controller: None) -> None:
    """A run ends while both are away; another is cancelled meanwhile. Facts 4 and 10."""
    run = cluster.launch_one(*TINY, "trainer.max_steps=60")
    held = cluster.launch_one(*HELD, "seed=3")
    cluster.wait_step(run, 1)
    daemon("stop", "slurmctld")
    cancel = cluster.shell(f"HPCDL_SLURM_PATIENCE_S=1 hpcdl cancel {held.run_id} 2>&1; echo code $?")
    assert "the wish is kept" in cancel and "code 3" in cancel and "does not answer" in cancel, cancel
    # Its own file first: each look at a run that isn't over takes squeue ten seconds now.
    cluster.until(
        lambda: True if '"COMPLETED"' in cluster.shell(f"cat {run.run_dir}/state.json") else None,
        "the end of a run that Slurm can't be asked about",
        story=lambda: cluster.story(run.run_id),
    )
    ended = cluster.status(run.run_id)
    assert (ended["state"], ended["exit_code"], ended["step"]) == ("COMPLETED", 0, 60)
    assert "unknown since" in cluster.status(held.run_id)["reason"]
    daemon("start", "slurmctld")
    status = cluster.wait_state(held.run_id, "CANCELLED", limit_s=60)
    assert status["reason"] == "cancelled while pending; it will never write a log"
    assert cluster.status(run.run_id)["state"] == "COMPLETED"
    assert "loss" in cluster.run("hpcdl", "status", run.job_id).stdout
    assert cluster.run("hpcdl", "logs", run.job_id).stdout


@pytest.fixture
def forgetful(cluster: Cluster, without_database: None) -> Iterator[None]:
    """Slurm forgets a job two seconds after its end, and no database remembers it."""

    def configure(change: str) -> None:
        file = "/etc/slurm/slurm.conf"
        cluster.root(
            "slurmctld", f"cp {file} {file}.new && sed -i '{change}' {file}.new && mv {file}.new {file}"
        )
        cluster.root("slurmctld", "scontrol reconfigure")

    configure("s/^MinJobAge=300/MinJobAge=2/")
    yield
    configure("s/^MinJobAge=2$/MinJobAge=300/")


def test_after_slurm_has_forgotten_the_job(cluster: Cluster, forgetful: None) -> None:
    """Fact 4: nothing but the runs' own files tells what became of them."""
    broken = cluster.launch_one(*TINY, "cluster.setup=['echo no such module >&2; exit 3']")
    held = cluster.launch_one(*HELD, "seed=4")
    cluster.shell(f"scancel {held.array_id}")

    def forgotten() -> bool | None:
        looks = [cluster.shell(f"scontrol show job {r.array_id} 2>&1", check=False) for r in (broken, held)]
        return True if all("Invalid job id" in look for look in looks) else None

    cluster.until(forgotten, "Slurm forgets both jobs", limit_s=120)
    failed, cancelled = cluster.status(broken.run_id), cluster.status(held.run_id)
    assert failed["state"] == "FAILED" and "cluster.setup failed with code 3" in failed["reason"], failed
    assert cancelled["state"] == "CANCELLED" and "while pending" in cancelled["reason"], cancelled
