"""What a node is looked at for before it trains, and how what it lacks is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcdl.errors import NotFitError
from hpcdl.launch import gpus, preflight, strays
from hpcdl.launch.gpus import Look
from hpcdl.plan.checkpoint import checkpoint_bytes
from hpcdl.runs.store import RunDir
from hpcdl.spec.plain import dump_yaml, to_plain
from tests.factory import tiny_spec
from tests.launch.making import alive, until

Usage = namedtuple("Usage", "total used free")
DEFAULT = {"name": "default", "disk_gb": None, "clock_s": 60.0, "allreduce_mib": 4.0, "min_mib_per_s": None}


def make(tmp_path: Path, cluster: dict[str, Any] | None = None, **settings: Any) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    plain = to_plain(tiny_spec())
    plain["cluster"].update(cluster or {})
    plain["preflight"] = {**DEFAULT, **settings}
    run.spec_file.write_text(dump_yaml(plain))
    return run


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "ROOM_WAIT_S", 0.0)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], None]:
    """Says how much is free below a folder."""
    given: dict[str, float] = {}
    real = shutil.disk_usage

    def usage(path: Any) -> Any:
        found = next((size for start, size in given.items() if str(path).startswith(start)), None)
        return real(path) if found is None else Usage(0, 0, found)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return given.__setitem__


def lacking(run: RunDir, **environment: str) -> NotFitError:
    with pytest.raises(NotFitError) as caught:
        preflight.check(run, "c2", environment)
    assert str(caught.value).startswith("preflight on node c2: ")
    return caught.value


def test_a_healthy_node_in_less_than_two_seconds(tmp_path: Path) -> None:
    started = time.perf_counter()
    report = preflight.check(make(tmp_path), "c1", {})
    assert time.perf_counter() - started < 2.0
    assert report.measured["disk_free_gb"] > 0 and report.measured["memory_free_gb"] > 0
    assert abs(report.measured["clock_s"]) < 1 and not report.warnings
    assert not list((tmp_path / "run").glob(".probe*"))


def test_a_disk_that_is_not_shared(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.spec_file.unlink()
    error = lacking(run)
    assert "must lie on a disk that all nodes share" in str(error) and not error.shared


def test_a_disk_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path)

    def refuse(number: int) -> Any:
        def fsync(_: int) -> None:
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(30))
    assert not lacking(run).shared, "read-only: this node's mount"
    monkeypatch.setattr(os, "fsync", refuse(28))
    error = lacking(run)
    assert error.shared and "No space left" in str(error)


def test_room_for_a_checkpoint_of_this_experiment(tmp_path: Path, free: Any) -> None:
    run = make(tmp_path)
    one = checkpoint_bytes(tiny_spec())
    assert one is not None
    free(str(run.path), preflight.MIN_FREE_BYTES + one)
    preflight.check(run, "c2", {})
    free(str(run.path), preflight.MIN_FREE_BYTES + one - 1)
    error = lacking(run)
    assert error.shared, "no node is left out for it"
    assert "logs and a checkpoint of this experiment need" in str(error)


def test_it_waits_for_room_for_a_while(tmp_path: Path, free: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "ROOM_WAIT_S", 60.0)
    run = make(tmp_path)
    free(str(run.path), 0.0)
    asked = []

    def clear_up() -> bool:
        asked.append(1)
        free(str(run.path), 2.0**40)
        return False

    assert preflight.check(run, "c2", {}, clear_up).measured["disk_free_gb"] == 1024
    free(str(run.path), 0.0)
    with pytest.raises(NotFitError, match="is full"):
        preflight.check(run, "c2", {}, lambda: True)
    assert len(asked) == 1


def test_room_as_the_config_says(tmp_path: Path, free: Any) -> None:
    run = make(tmp_path, disk_gb=2.0)
    free(str(run.path), 2**30)
    assert "1.0 GiB are free, preflight.disk_gb says 2.0 GiB" in str(lacking(run))


def test_a_checkpoints_size_is_what_is_trained_and_its_optimizers_state() -> None:
    whole = checkpoint_bytes(tiny_spec())
    adapters = checkpoint_bytes(tiny_spec(peft__name="lora"))
    plain = checkpoint_bytes(tiny_spec(optim__name="sgd", optim__momentum=0.0))
    assert whole is not None and adapters is not None and plain is not None
    assert whole == 3 * plain and adapters < whole
    assert checkpoint_bytes(tiny_spec(model__shape=None)) is None


def test_the_nodes_own_disk(tmp_path: Path, free: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "tmp"
    own.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(own))
    free(str(own), 1024.0)
    error = lacking(make(tmp_path))
    assert not error.shared and f"{own} is full" in str(error)


@pytest.mark.parametrize(("off_s", "words"), [(90.0, "90.0 s ahead of"), (-90.0, "90.0 s behind")])
def test_a_clock_that_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off_s: float, words: str
) -> None:
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + off_s)
    assert f"the clock is {words} the shared disk's" in str(lacking(make(tmp_path)))


def test_a_clock_that_is_off_by_little_is_only_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 5)
    (warning,) = preflight.check(make(tmp_path), "c2", {}).warnings
    assert warning == "the clock is 5.0 s ahead of the shared disk's"


def test_memory_that_others_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_bytes", lambda: 10 * 2**30)
    preflight.check(make(tmp_path, {"kind": "slurm", "mem_gb": 11.0}), "c2", {})
    (tmp_path / "b").mkdir()
    error = lacking(make(tmp_path / "b", {"kind": "slurm", "mem_gb": 12.0}))
    assert "10.0 GiB of memory are free, cluster.mem_gb=12 was promised" in str(error)
    (tmp_path / "c").mkdir()
    assert "64 workers need at least" in str(lacking(make(tmp_path / "c", {"processes_per_node": 64})))


def test_what_the_kernel_says_of_memory(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 8 kB\nMemAvailable:   4 kB\n")
    assert preflight.available_bytes(tmp_path / "meminfo") == 4096
    assert preflight.available_bytes(tmp_path / "none") is None


def test_none_looks_at_the_run_directory_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_bytes", lambda: 0)
    preflight.check(make(tmp_path, name="none"), "c2", {})


def test_several_faults_are_told_at_once(tmp_path: Path, free: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path)
    monkeypatch.setattr(preflight, "available_bytes", lambda: 0)
    free(str(run.path), 1.0)
    error = lacking(run)
    assert "of memory are free" in str(error) and "is full" in str(error) and not error.shared


SLEEP = "import time; time.sleep(600)"


@pytest.fixture
def left(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    """A process of an agent; the parameter is that one's name."""
    environment = {**os.environ, strays.AGENT: request.param, "SLURM_JOB_ID": "77"}
    process = subprocess.Popen([sys.executable, "-c", SLEEP], env=environment)
    place = Path(f"/proc/{process.pid}/environ")
    until(lambda: strays.AGENT.encode() in place.read_bytes(), "exec")
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("left", ["1:0.00:77", "4194304:12.00:77"], indirect=True)
def test_what_a_dead_agent_has_left_behind_is_ended(tmp_path: Path, left: subprocess.Popen[bytes]) -> None:
    warnings = preflight.check(make(tmp_path), "c2", {}).warnings
    (said,) = (text for text in warnings if str(left.pid) in text)
    assert said.startswith(f"killed process {left.pid} (") and said.endswith("left behind by job 77")
    assert not alive(left.pid)


@pytest.mark.parametrize(
    "left",
    [f"{strays.name_of_this_agent()}77", "1:0.00:76", "1:0.00:", "", "1:0.00", "x:y:77"],
    indirect=True,
)
def test_a_living_agents_processes_are_left_alone_and_those_of_other_jobs(
    tmp_path: Path, left: subprocess.Popen[bytes]
) -> None:
    preflight.check(make(tmp_path), "c2", {})
    assert alive(left.pid)


SMI = """#!/bin/sh
case "$*" in
*compute-apps*) printf '%s' "$HOLDERS" ;;
*) [ -z "$BROKEN" ] || { echo "$BROKEN"; exit 15; }; printf '%s' "$GPUS" ;;
esac
"""


def nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **said: str) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, text in said.items():
        monkeypatch.setenv(name, text)


HEALTHY = "0, GPU-a, 4, 81559, 0, Not Active, Not Active\n1, GPU-b, 4, 81559, [N/A], [N/A], Not Active\n"


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"GPUS": HEALTHY}, None),
        ({"GPUS": HEALTHY.splitlines()[0]}, "1 GPUs answer, cluster.gpus_per_node=2 were promised"),
        (
            {"GPUS": HEALTHY.replace("81559, 0", "81559, 3")},
            "GPU 0 has had 3 uncorrected memory errors (ECC)",
        ),
        (
            {"GPUS": HEALTHY.replace("GPU-b, 4", "GPU-b, 70000"), "HOLDERS": "4711, GPU-b, 69990\n"},
            "process 4711 holds 70000 of 81559 MiB of GPU 1",
        ),
        ({"GPUS": HEALTHY.replace("GPU-b, 4", "GPU-b, 70000")}, "somebody holds 70000 of 81559 MiB of GPU 1"),
        (
            {"BROKEN": "Unable to determine the device handle for GPU 0000:65:00.0: GPU is lost."},
            "nvidia-smi: Unable to determine the device handle for GPU 0000:65:00.0: GPU is lost.",
        ),
    ],
)
def test_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, str], problem: str | None
) -> None:
    nvidia(tmp_path, monkeypatch, **said)
    run = make(tmp_path, {"gpus_per_node": 2})
    if problem is None:
        assert preflight.check(run, "c2", {"CUDA_VISIBLE_DEVICES": "0,1"}).measured["gpus"] == 2
    else:
        assert problem in str(lacking(run))


def test_a_gpu_that_is_held_down_is_only_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia(tmp_path, monkeypatch, GPUS=HEALTHY.replace("0, Not Active", "0, Active"))
    (warning,) = preflight.check(make(tmp_path, {"gpus_per_node": 2}), "c2", {}).warnings
    assert warning.startswith("GPU 0 is held down by its hardware")


def test_without_nvidia_smi_nothing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.look({}) is None
    assert Look().problems(0) == []
