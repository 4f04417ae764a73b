"""From a machine that shares no disk with the cluster: over ssh to the login node's own sshd, and into the queue."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import CLUSTER, LIMIT_S, Cluster

TINY = ("launch", "+experiment=pretrain_tiny", "cluster=slurm_docker", "trainer.max_steps=4")
HOLD = (
    "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
    "print('held', flush=True); sys.stdin.read()"
)


class Laptop:
    """A folder of its own on this machine, and ssh with a configuration of its own."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        if shutil.which("ssh") is None or shutil.which("rsync") is None:
            pytest.fail("ssh and rsync are needed here: apt install openssh-client rsync")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        told = subprocess.run(
            [CLUSTER, "ssh-config", folder / "key.pub"], capture_output=True, text=True, check=True
        ).stdout
        self.host = told.split()[1]
        self.there = f"{cluster.home}/다른 runs"
        (folder / "config").write_text(told)
        (folder / "bin").mkdir()
        ssh = folder / "bin" / "ssh"
        ssh.write_text(
            f'#!/bin/sh\nexec {shutil.which("ssh")} -F {shlex.quote(str(folder / "config"))} "$@"\n'
        )
        ssh.chmod(0o755)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HPCDL_")}
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.environment = {
            **kept,
            "PATH": path,
            "HPCDL_RUNS": str(folder / "runs"),
            "XDG_RUNTIME_DIR": str(folder),
        }
        self.folder = folder

    def start(self, *words: str) -> subprocess.Popen[str]:
        """`hpcdl …`, on its way."""
        return subprocess.Popen(
            [sys.executable, "-m", "hpcdl", *words], cwd=self.folder, env=self.environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def hpcdl(self, *words: str, code: int = 0) -> str:
        """What it prints."""
        out, err = (process := self.start(*words)).communicate(timeout=LIMIT_S)
        assert process.returncode == code, f"{words}\nexit {process.returncode}\n{out}\n{err}"
        return out

    @property
    def words(self) -> list[str]:
        """What makes a launch go there."""
        return [f"cluster.login_host={self.host}", f"cluster.login_dir='{self.there}'",
                "cluster.login_python=/shared/env/bin/python"]  # fmt: skip


@pytest.fixture
def laptop(cluster: Cluster, tmp_path: Path) -> Iterator[Laptop]:
    made = Laptop(tmp_path, cluster)
    yield made
    for socket in (tmp_path / "hpcdl-ssh").glob("*"):
        subprocess.run(
            [tmp_path / "bin" / "ssh", "-o", f"ControlPath={socket}", "-O", "exit", made.host], check=False
        )


def test_a_sweep_from_a_laptop_whose_connection_is_cut(cluster: Cluster, laptop: Laptop) -> None:
    name = f"remote-{os.getpid()}"
    sweep = (*TINY, *laptop.words, "-m", "seed=1,2", "force=true", f"name={name}")
    text = laptop.hpcdl(*sweep, "dry_run=true")
    found = re.search(r"hpcdl:([0-9a-f]{12})", text)
    assert found is not None, text
    folder = f"{laptop.there}/.submissions/{found[1]}"
    assert cluster.shell(f"ls -A {shlex.quote(laptop.there)} 2>&1 || true").find("No such file") >= 0

    # The submission's own lock holds it in the middle; then the login node drops every connection.
    cluster.run("mkdir", "-p", folder)
    holder = subprocess.Popen(
        [CLUSTER, "run", "python", "-c", HOLD, f"{folder}/.lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdin is not None and holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    launch = laptop.start(*sweep, "parsable=true")
    waiting = lambda: cluster.root("login", "grep -e '-> POSIX' /proc/locks || true").strip() or None  # noqa: E731
    cluster.until(waiting, "the launch waits for its submission's lock", story=cluster.home.__str__)
    cluster.root("login", "pkill -u student sshd")
    holder.communicate(timeout=LIMIT_S)
    out, err = launch.communicate(timeout=LIMIT_S)
    assert launch.returncode == 0 and "asking again what became of it" in err, err
    rows = [line.split("\t") for line in out.splitlines()]
    jobs = {job_id.partition("_")[0] for _, job_id, _ in rows}
    assert len(rows) == 2 and len(jobs) == 1, out
    assert cluster.shell(f"squeue -h -t all -n {name} -o %F | sort -u").split() == [*jobs]

    first, second = (row[0] for row in rows)
    logs = laptop.hpcdl("logs", "-f", first)
    assert "step" in logs and laptop.hpcdl("follow", first, second)
    statuses = json.loads(laptop.hpcdl("status", name, "--json"))
    assert [(one["state"], one["step"], one["host"]) for one in statuses] == [
        ("COMPLETED", 4, laptop.host)
    ] * 2
    assert cluster.shell(f"cat {shlex.quote(rows[0][2] + '/job.sh')}").strip() in text
    laptop.hpcdl("report", first, "--output", "page.html")
    assert name in (laptop.folder / "page.html").read_text()


def test_a_run_is_cancelled_from_a_laptop(cluster: Cluster, laptop: Laptop) -> None:
    out = laptop.hpcdl(*TINY, *laptop.words, "name=endless", "trainer.max_steps=100000", "parsable=true")
    run_id = out.split("\t")[0]
    cluster.until(lambda: laptop.hpcdl("status", run_id).find("RUNNING") > 0 or None, "it runs")
    assert "CANCELLED" in laptop.hpcdl("cancel", run_id)
    assert json.loads(laptop.hpcdl("status", run_id, "--json"))["state"] == "CANCELLED"
