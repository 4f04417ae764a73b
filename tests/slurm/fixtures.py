"""The real cluster: started where Docker is, used if it already runs, required with HPCDL_REQUIRE_CLUSTER=1."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import CLUSTER, Cluster

REQUIRED = os.environ.get("HPCDL_REQUIRE_CLUSTER") == "1"


def why_no_docker() -> str | None:
    if shutil.which("docker") is None:
        return "docker is not installed"
    for command, fault in (
        (["docker", "info"], "no Docker engine answers (docker info)"),
        (["docker", "compose", "version"], "Docker Compose v2 is missing (docker compose version)"),
    ):
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            return fault
    return None


def is_running() -> bool:
    return subprocess.run([CLUSTER, "run", "true"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    """The cluster is up; it goes down again after the tests if it was not up before them."""
    fault = why_no_docker()
    if fault is not None:
        message = f"THE SLURM CLUSTER IS NOT TESTED: {fault}. Install Docker with Compose v2 and run make test again."
        if REQUIRED:
            pytest.fail(message)
        pytest.skip(message)
    was_running = is_running()
    subprocess.run([CLUSTER, "up"], check=True)
    yield
    if not was_running:
        subprocess.run([CLUSTER, "down"], check=True)


@pytest.fixture
def cluster(slurm: None, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A fresh folder on the shared disk; whatever the test left in the queue is cancelled after it."""
    home = f"/shared/home/student/test-{request.node.name}-{os.getpid()}"
    subprocess.run([CLUSTER, "run", "mkdir", "-p", home], check=True)
    cluster = Cluster(home)
    yield cluster
    cluster.shell("scancel --user=student; scancel --user=student --signal=KILL", check=False)
    cluster.until(
        lambda: True if not cluster.shell("squeue -h -u student").strip() else None, "an empty queue"
    )
