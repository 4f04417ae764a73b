"""Slurm jobs in containers: what is rendered and refused, and the way of Slurm's commands from inside to outside."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpcdl import experiment
from hpcdl.errors import Fault
from hpcdl.launch import containers, control, requeue
from hpcdl.launch.slurm import BACKEND
from hpcdl.runs import outside
from hpcdl.runs.scheduler import run_command
from hpcdl.spec import ClusterSpec
from hpcdl.spec.container import Mount
from tests.factory import tiny_plain, tiny_spec
from tests.fake_slurm import FakeSlurm
from tests.launch.making import FAKE_TORCH, HERE, Agents, request, until
from tests.launch.test_template import start

SLURM = {"cluster__kind": "slurm"}


def faults(**dotted: Any) -> dict[str, Fault]:
    found = experiment.check(tiny_plain(**{**SLURM, **{f"cluster__{key}": v for key, v in dotted.items()}}))
    return {fault.key: fault for fault in found.faults}


def test_what_is_wrong_with_a_container_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "train.sif").touch()
    found = faults(
        container="apptainer",
        container_image=str(tmp_path / "trian.sif"),
        container_mounts=["data", "/a:/b", "/c:/b:ro", "/a:/b:x"],
        container_args=["--bind=/x", "--pwd=/y", "oops"],
        container_python="-c",
        srun_args=["--container-image=x"],
    )
    assert {key: fault.problem for key, fault in found.items()} == {
        "cluster.container_image": "there is no such image",
        "cluster.container_mounts.0": "is no mount",
        "cluster.container_mounts.2": "/a:/b is shown at /b already",
        "cluster.container_mounts.3": "is no mount",
        "cluster.container_args.0": "--bind has a key of its own",
        "cluster.container_args.1": "hpcdl sets --pwd itself, and relies on it",
        "cluster.srun_args.0": "--container-image is cluster.container's to say: the agent must be told, too",
        "cluster.container_python": "is no path of a Python",
    }
    assert found["cluster.container_image"].fix == f"cluster.container_image={tmp_path}/train.sif"


@pytest.mark.parametrize(
    ("given", "key", "problem", "fix"),
    [
        ({"container": "apptainer"}, "image", "needs an image", "cluster.container_image=/shared/train.sif"),
        ({"container": "pyxis"}, "image", "needs an image", "cluster.container_image=/shared/train.sqsh"),
        ({"container_image": "/x.sif"}, "image", "nothing would use it", "cluster.container=apptainer"),
        ({"container_args": ["--x"]}, "args", "nothing would use it", "cluster.container=apptainer"),
        ({"container": "pyxis", "container_image": "/x.sif"}, "image", "apptainer's", "cluster.container=apptainer"),
        ({"container": "apptainer", "container_image": "x.sqsh"}, "image", "pyxis's", "cluster.container=pyxis"),
        (
            {"container": "pyxis", "container_image": "docker://nvcr.io/nvidia/pytorch:25.09-py3"},
            "image",
            "docker:// is apptainer's way to say it",
            "'cluster.container_image=nvcr.io#nvidia/pytorch:25.09-py3'",
        ),
        (
            {"container": "pyxis", "container_image": "a#b", "container_mounts": ["/my data"]},
            "mounts.0",
            "pyxis ends a path at a space",
            "cluster.container=apptainer",
        ),
        ({"container": "docker", "container_image": "x"}, "", "choices", "cluster.container="),
    ],
)  # fmt: skip
def test_each_container_takes_its_own(given: dict[str, Any], key: str, problem: str, fix: str) -> None:
    found = faults(**given)
    fault = found[f"cluster.container_{key}" if key else "cluster.container"]
    assert problem in fault.problem and fix in fault.fix, fault


@pytest.mark.parametrize(("kind", "instead"), [("local", "apptainer exec IMAGE hpcdl launch")])
def test_only_slurms_jobs_are_put_into_one(kind: str, instead: str) -> None:
    (fault,) = experiment.check(
        tiny_plain(cluster__kind=kind, cluster__container="apptainer", cluster__container_image="docker://x")
    ).faults
    assert (fault.key, fault.value) == ("cluster.container", "apptainer") and instead in fault.fix


def test_pyxis_cant_show_a_folder_with_a_space() -> None:
    plain = tiny_plain(
        **SLURM, cluster__container="pyxis", cluster__container_image="a#b:c", runs_dir="my runs"
    )
    (fault,) = experiment.check(plain).faults
    assert fault.key == "runs_dir" and "pyxis" in fault.problem


def test_the_container_is_not_part_of_the_experiment() -> None:
    other = {"container": "pyxis", "container_image": "a#b", "container_mounts": ["/x"]}
    changed = tiny_spec(**{f"cluster__{key}": value for key, value in other.items()})
    assert experiment.digest(changed) == experiment.digest(tiny_spec())


def test_what_is_shown(tmp_path: Path) -> None:
    text, secrets, hub = tmp_path / "texts" / "a.txt", tmp_path / "secrets.env", tmp_path / "hub"
    text.parent.mkdir()
    text.touch()
    secrets.touch()
    spec = tiny_spec(
        data__paths=[str(text), f"{tmp_path}/texts/*.txt", "/not/there"], cluster__container="apptainer"
    )
    cluster = ClusterSpec(
        kind="slurm", container="apptainer", container_mounts=("/local:/tmp", "/opt/site:/opt/x:ro")
    )
    environment = {"HF_HOME": str(hub), "HPCDL_CACHE": "/runs/cache", "HPCDL_SECRETS": str(secrets)}
    found = containers.mounts(cluster, Path("/runs"), [spec, spec], environment)
    assert set(found) == {
        Mount(source="/runs", target="/runs"),  # and in it, the cache
        Mount(source="/local", target="/tmp"),  # in place of the node's own
        Mount(source="/opt/site", target="/opt/x", read_only=True),
        Mount(source=str(hub), target=str(hub), made=True),
        Mount(source=str(secrets), target=str(secrets), read_only=True),
        Mount(source=str(text), target=str(text), read_only=True),
        Mount(source=str(text.parent), target=str(text.parent), read_only=True),
    }
    assert found.index(Mount.of("/runs")) < found.index(Mount.of(str(hub), made=True)), "outer ones first"
    made = request(mounts=found)
    containers.make_caches(made)
    assert hub.is_dir()
    assert containers.mounts(ClusterSpec(kind="slurm"), Path("/runs"), [spec], environment) == ()


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Sequence[str], str]]]:
    """This process is inside; outside somebody notes what is asked for."""
    asked: list[tuple[Sequence[str], str]] = []

    def run(command: Sequence[str], text: str, limit_s: float) -> outside.Done:
        asked.append((command, text))
        return subprocess.CompletedProcess(command, 3, f"{command[0]} has said é", f"in {limit_s:g} s")

    with contextlib.closing(outside.Outside(run)) as other:
        monkeypatch.setenv(outside.VARIABLE, other.name)
        yield asked


def test_slurms_commands_are_run_outside(inside: list[tuple[Sequence[str], str]]) -> None:
    done = control.run(["scontrol", "requeue", "9 9"])
    assert (done.returncode, done.stdout, done.stderr) == (3, "scontrol has said é", "in 30 s")
    assert run_command(["squeue", "-h"], "asked\n", 4).stdout == "squeue has said é"
    assert inside == [(["scontrol", "requeue", "9 9"], ""), (["squeue", "-h"], "asked\n")]
    refused = outside.run(["rm", "-rf", "/nothing"], "", 5)
    assert (refused.returncode, len(inside)) == (126, 2) and "no command of Slurm's" in refused.stderr


def test_nobody_outside_and_another_users_outside(
    inside: list[tuple[Sequence[str], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    done = outside.run(["squeue"], "", 5)
    assert (done.returncode, inside) == (127, []) and f"user {own}'s" in done.stderr
    monkeypatch.undo()
    monkeypatch.setenv(outside.VARIABLE, "hpcdl-nobody")
    assert outside.run(["squeue"], "", 5).returncode == 127


def test_srun_starts_the_agent_inside(tmp_path: Path, slurm: FakeSlurm) -> None:
    code = tmp_path / "code"
    lines: dict[str, Any] = {
        "container": "apptainer",
        "container_image": "/images/my train.sif",
        "mounts": (Mount.of("/a, b", read_only=True),),
    }
    done = start(
        tmp_path,
        slurm,
        {},
        lines=lines,
        SLURM_JOB_NODELIST="n1",
        PYTHONPATH=str(Path.cwd()),
        HPCDL_CODE=str(code),
    )
    assert (done.returncode, done.stderr) == (0, "")
    (call,) = slurm.calls("srun")
    program = call["argv"][call["argv"].index("apptainer") :]
    assert program[:4] == ["apptainer", "exec", "--no-mount=home,cwd", f"--pwd={tmp_path}/my runs"]
    assert program[4:7] == [
        '--mount=type=bind,"source=/a, b","destination=/a, b",ro',
        "/images/my train.sif",
        "python3",
    ]
    assert program[7:9] == ["-m", "hpcdl.launch.job"]
    assert re.fullmatch(rf"hpcdl-{os.getuid()}-[0-9a-f]{{32}}", call["environment"]["HPCDL_OUTSIDE"])


def test_what_is_handed_in() -> None:
    given = {"PYTHONPATH": "/code:/site/python", "HPCDL_CODE": "/code", "VIRTUAL_ENV": "/env", "NCCL_DEBUG": "INFO",
             "TMPDIR": "/local/job7", "HOME": "/home/me", "HF_HOME": "/data/hub"}  # fmt: skip
    found = containers.environment(given)
    assert found["PYTHONPATH"] == "/code" and "VIRTUAL_ENV" not in found and found["NCCL_DEBUG"] == "INFO"
    assert (found["TMPDIR"], found["HF_HOME"], found["PYTHONNOUSERSITE"]) == ("/tmp", "/data/hub", "1")
    assert "PYTHONPATH" not in containers.environment({"PYTHONPATH": "/site/python"})


def test_an_agent_inside_hands_over_to_a_successor(agents: Agents, slurm: FakeSlurm, tmp_path: Path) -> None:
    """Its own PATH has none of Slurm's commands, as in an image; the job that follows gets the environment outside."""
    agents.cluster = {"kind": "slurm"}
    run = agents.make("wait")
    folder = agents.runs_dir / ".submissions" / agents.token
    (folder / "job.sh").write_text(BACKEND.render(request(runs_dir=agents.runs_dir)))
    slurm.set(job_show="JobId=12 JobState=RUNNING Reason=None Restarts=0")
    bare = tmp_path / "bare"
    bare.mkdir()
    path = [*map(str, (FAKE_TORCH, HERE.parents[1]))]
    program = [
        "/usr/bin/env",
        f"PATH={bare}",
        f"PYTHONPATH={':'.join(path)}",
        "OF_THE_IMAGE=1",
        sys.executable,
    ]
    job = agents.start("srun", "--kill-on-bad-exit=1", "--", *program, **agents._job(0, 1))
    pids = agents.pids()
    until(lambda: run.read_state().state == "RUNNING", "the agent has begun")
    for pid in (*pids, run.read_state().agent_pid or 0):
        os.kill(pid, signal.SIGUSR2)
    code, said = agents.end(job)
    assert code == requeue.HANDED_OVER, (said, run.events()[-1])
    state = run.read_state()
    assert (state.state, state.job_id) == ("PENDING", "1_0"), said
    (call,) = slurm.calls("sbatch")
    assert not {name for name in call["environment"] if name.startswith("SLURM")}
    assert not slurm.calls("srun")[0]["environment"].keys() & {"PYTHONPATH", "OF_THE_IMAGE"}
