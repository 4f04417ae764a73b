"""The pods of a rendered Kubernetes Job, run as containers (docker/play-pods) beside the cluster, with its environment.

Not the image of docker/Dockerfile.train: another torch would have to be installed. The manifest is the launcher's own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import LIMIT_S, ROOT, Cluster
from tests.slurm.test_runs import LONG, TINY

PLAY = ROOT / "docker" / "play-pods"
PROJECT = os.environ.get("COMPOSE_PROJECT_NAME", "hpcdl")
IMAGE = f"hpcdl-slurm:{os.environ.get('DEBIAN_RELEASE', 'bookworm')}"
USER = os.getuid() or 1000
"""Pods write the claim as this user, who reads it here."""
POD_WORDS = (
    "cluster=kubernetes", "cluster.nodes=2", f"cluster.kubernetes.image={IMAGE}", "cluster.kubernetes.runs_claim=runs",
    "cluster.kubernetes.claims={/shared: shared, /hpcdl: 'source:ro'}", "cluster.python=/shared/env/bin/python",
    f"cluster.kubernetes.run_as_user={USER}",
)  # fmt: skip


class Pods:
    """The pods of one launch, played."""

    def __init__(self, cluster: Cluster, folder: Path, *overrides: str) -> None:
        self.folder = folder / "claim"
        self.folder.mkdir()
        self.folder.chmod(0o777)  # what fsGroup does
        manifest = folder / "job.yaml"
        manifest.write_text(cluster.run("hpcdl", "launch", *POD_WORDS, *overrides, "dry_run=true").stdout)
        volumes = {"runs": self.folder, "shared": f"{PROJECT}_shared", "source": ROOT}
        claims = [word for name, place in volumes.items() for word in ("--claim", f"{name}={place}")]
        self.logs = folder / "logs"
        self.process = subprocess.Popen(
            [sys.executable, PLAY, *claims, "--logs", self.logs, manifest],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def say(self, line: str) -> None:
        """Something happens to a pod."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def end(self, code: int = 0) -> str:
        """What was said until the Job was over; 0: Complete, 1: Failed."""
        said, _ = self.process.communicate(timeout=LIMIT_S)
        assert self.process.returncode == code, f"{said}\n{self.story()}"
        return said

    def story(self) -> str:
        """The pods' logs."""
        return "\n".join(
            f"{file.name}\n{file.read_text()[-4000:]}" for file in sorted(self.logs.glob("*.log"))
        )

    def lines(self, name: str) -> list[dict[str, Any]]:
        """A file of JSON lines of the only run."""
        found = [*self.folder.glob(f"*/*/{name}")]
        return [json.loads(line) for line in found[0].read_text().splitlines()] if found else []

    def losses(self) -> dict[int, float]:
        """Training loss by step."""
        return {line["step"]: line["loss"] for line in self.lines("metrics.jsonl") if "loss" in line}

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Those of one kind."""
        return [event for event in self.lines("events.jsonl") if event["event"] == kind]


@pytest.fixture
def folder(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """Where pods write as another user than this one; cleared as that user."""
    yield tmp_path
    subprocess.run(
        [
            "docker",
            "run",
            "--rm",
            "--entrypoint",
            "rm",
            "-v",
            f"{tmp_path}:/made",
            IMAGE,
            "-rf",
            "/made/claim",
        ],
        check=True,
    )


def test_two_pods_give_the_loss_of_two_processes(cluster: Cluster, folder: Path) -> None:
    pods = Pods(cluster, folder, *TINY, "trainer.max_steps=6")
    local = ("cluster=local", "cluster.processes_per_node=2", "parsable=true")
    alone = cluster.run("hpcdl", "launch", *TINY, "trainer.max_steps=6", *local)
    said = pods.end()
    assert re.search(r"Job pretrain-tiny-\w+-0: Complete", said)
    (started,) = pods.events("started")
    assert len(set(started["node_list"])) == 2 and len(pods.events("finished")) == 1
    run_dir = alone.stdout.split("\t")[2].strip()
    text = cluster.shell(f"cat {run_dir}/metrics.jsonl")
    expected = {line["step"]: line["loss"] for line in map(json.loads, text.splitlines()) if "loss" in line}
    assert list(expected) == [1, 2, 3, 4, 5, 6]
    assert pods.losses() == expected, "bit for bit: the same ranks add the same numbers"


@pytest.mark.slow
def test_a_preempted_pod_is_made_anew_and_the_run_goes_on(cluster: Cluster, folder: Path) -> None:
    pods = Pods(cluster, folder, *LONG)
    cluster.until(lambda: True if len(pods.losses()) >= 3 else None, "3 steps", story=pods.story)
    pods.say("disrupt 1")
    (resumed,) = cluster.until(lambda: pods.events("resumed") or None, "another try", story=pods.story)
    enough = resumed["step"] + 3
    cluster.until(lambda: True if enough in pods.losses() else None, "3 more steps", story=pods.story)
    next(pods.folder.glob("*/*/state.json")).with_name("STOP").write_text("cancel me\n")
    said = pods.end(code=1)
    assert "is disrupted: SIGTERM" in said and "Ignore" in said and "Failed: PodFailurePolicy" in said
    (requeued,) = pods.events("requeued")
    assert (
        requeued["kind"] == "preempted"
        and f"checkpoint saved at step {resumed['step']}" in requeued["reason"]
    )
    steps = [line["step"] for line in pods.lines("metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)), "none lost, none twice"
