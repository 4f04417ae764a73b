from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from hpcdl.errors import SchedulerError
from hpcdl.launch import backends, template
from hpcdl.launch.slurm import BACKEND, chunks, throttles
from hpcdl.spec.container import Mount
from tests.fake_slurm import FakeSlurm
from tests.launch.making import GOLDEN, golden, request

ALL_OPTIONS = {
    "nodes": 4,
    "processes_per_node": 8,
    "cpus_per_process": 6,
    "gpus_per_node": 8,
    "mem_gb": 480.5,
    "time_min": 1440,
    "partition": "gpu",
    "account": "project 7",
    "qos": "high",
    "constraint": "a100|h100",
    "exclude": "c[1-2,7]",
    "reservation": "tutorial",
    "signal": "B:USR2@300",
    "setup": ("module load cuda/12.4", "source '/opt/my env/bin/activate'"),
    "teardown": ("rm -rf '/tmp/my cache'",),
    "extra": ("--mail-type=END,FAIL", "--exclusive"),
    "srun_args": ("--mpi=none", "--cpu-bind=map_cpu:0, 1"),
    "array_parallelism": 2,
    "after_jobs": ("4711", "4712_3"),
}
SCRIPTS = {
    "slurm-single.sh": request(time_min=60),
    "slurm-2x2.sh": request(nodes=2, processes_per_node=2, cpus_per_process=2, mem_gb=4, time_min=30),
    "slurm-array.sh": request(12, array_parallelism=5, partition="debug", time_min=10),
    "slurm-gres.sh": request(gres="gpu:a100:4", gpus_per_node=4, processes_per_node=4, cpus_per_process=8),
    "slurm-all-options.sh": request(3, runs_dir=Path("/shared/my runs/100%"), **ALL_OPTIONS),
    "slurm-apptainer.sh": request(
        nodes=2,
        gpus_per_node=2,
        processes_per_node=2,
        container="apptainer",
        container_image="/images/my train.sif",
        container_args=("--env", "NCCL_DEBUG=INFO, WARN"),
        code=Path("/shared/runs/.code/0123456789abcdef"),
        mounts=(
            Mount.of("/tmp"),
            Mount.of("/shared/runs"),
            Mount.of("/shared/texts, old", read_only=True),
            Mount(source="/opt/site", target="/opt/x"),
        ),
    ),
    "slurm-pyxis.sh": request(
        gres="gpu:a100:4",
        srun_args=("--mpi=none",),
        container="pyxis",
        container_image="nvcr.io#nvidia/pytorch:25.09-py3",
        container_python="/opt/venv/bin/python",
        container_args=("--container-writable",),
        code=Path("/shared/runs/.code/0123456789abcdef"),
        mounts=(
            Mount.of("/tmp"),
            Mount.of("/shared/runs"),
            Mount.of("/shared/texts", read_only=True),
        ),
    ),
}


def options(text: str) -> dict[str, str]:
    """The #SBATCH options as sbatch reads them."""
    found = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH "):
            (word,) = shlex.split(line.removeprefix("#SBATCH "))
            name, _, value = word.removeprefix("--").partition("=")
            found[name] = value
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_whole_scripts(name: str) -> None:
    golden(name, BACKEND.render(SCRIPTS[name]))


def test_every_golden_script_is_tested() -> None:
    assert {f.name for f in GOLDEN.glob("slurm-*")} == SCRIPTS.keys()


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_can_read_them(name: str, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(BACKEND.render(SCRIPTS[name]))
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


def test_the_body_is_the_hand_templates_own_text() -> None:
    by_hand = template.path().read_text()
    body = by_hand[by_hand.index(template.MARKER) :]
    assert BACKEND.render(request()).endswith(body)
    assert "    srun --export=ALL " in body


def test_array_and_interactive_reuse_the_same_text() -> None:
    for name in ("array.sbatch", "interactive.sh"):
        text = (template.path().parent / name).read_text()
        assert "hpcdl.launch.template" in text
        assert "srun " not in text.replace("salloc", "")


def test_values_with_spaces_and_signs_survive() -> None:
    found = options(BACKEND.render(SCRIPTS["slurm-all-options.sh"]))
    assert found["account"] == "project 7"
    assert found["constraint"] == "a100|h100"
    assert found["exclude"] == "c[1-2,7]"
    assert found["mem"] == "492032M"
    assert found["array"] == "0-2%2"
    assert found["dependency"] == "afterok:4711:4712_3"
    assert found["kill-on-invalid-dep"] == "yes"
    assert found["mail-type"] == "END,FAIL"
    # %% is a plain % in Slurm's file name patterns.
    assert found["output"] == "/shared/my runs/100%%/.submissions/20260131-120000-ab12/slurm-%A_%a.out"


def test_null_settings_are_left_to_the_cluster() -> None:
    found = options(BACKEND.render(request(signal=None)))
    assert found.keys() == {
        "job-name",
        "comment",
        "array",
        "nodes",
        "ntasks-per-node",
        "cpus-per-task",
        "output",
        "open-mode",
        "requeue",
    }
    assert found["comment"] == "hpcdl:20260131-120000-ab12"


def test_gres_stands_instead_of_gpus_per_node() -> None:
    found = options(BACKEND.render(SCRIPTS["slurm-gres.sh"]))
    assert found["gres"] == "gpu:a100:4"
    assert "gpus-per-node" not in found
    assert options(BACKEND.render(request(gpus_per_node=2)))["gpus-per-node"] == "2"


def test_the_throttle_is_never_more_than_the_tasks() -> None:
    assert options(BACKEND.render(request(3, array_parallelism=100)))["array"] == "0-2%3"


def test_render_touches_nothing(tmp_path: Path) -> None:
    BACKEND.render(request(runs_dir=tmp_path / "runs"))
    assert list(tmp_path.iterdir()) == []


def test_submit_sends_the_very_text_once(slurm: FakeSlurm, tmp_path: Path) -> None:
    job = request(50, runs_dir=tmp_path / "runs")
    text = BACKEND.render(job)
    assert BACKEND.submit(job, text) == "1"
    (call,) = slurm.calls("sbatch")
    assert call["script"] == text
    names = sorted(file.name for file in job.folder.iterdir())
    assert names == [".job.lock", "asked", "submission.json"], "submitit's copies are gone"


def test_a_submission_has_one_job(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = request(2, runs_dir=tmp_path / "runs")
    assert [BACKEND.submit(job, BACKEND.render(job)) for _ in range(2)] == ["1", "1"]
    assert [slurm.task(task)["state"] for task in ("1_0", "1_1", "2_0", "2_1")] == ["PENDING"] * 2 + [
        "CANCELLED"
    ] * 2
    assert "has reached Slurm 2 times: 2 cancelled" in capsys.readouterr().err


def test_a_launch_from_inside_a_job_takes_nothing_of_it_along(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_MEM_PER_NODE", "SLURM_JOB_ID", "SLURM_CPU_BIND", "SLURMD_NODENAME", "HPCDL_LOCAL"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    monkeypatch.setenv("HPCDL_RUNS", "/runs")
    job = request(runs_dir=tmp_path / "runs")
    BACKEND.submit(job, BACKEND.render(job))
    (call,) = slurm.calls("sbatch")
    passed = {k: v for k, v in call["environment"].items() if k != "HPCDL_SLURM_PATIENCE_S"}
    assert passed == {"SLURM_CONF": "/etc/slurm/slurm.conf", "HPCDL_RUNS": "/runs"}


def test_a_refusal_carries_sbatchs_words(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.set(refuse="Batch job submission failed: Invalid partition name specified")
    job = request(runs_dir=tmp_path / "runs", partition="nowhere")
    with pytest.raises(SchedulerError) as caught:
        BACKEND.submit(job, BACKEND.render(job))
    assert "Invalid partition name specified" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_controller_that_is_away_is_said(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.set(down=True)
    job = request(runs_dir=tmp_path / "runs")
    with pytest.raises(SchedulerError, match="Unable to contact slurm controller"):
        BACKEND.submit(job, BACKEND.render(job))


def test_without_sbatch_nothing_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    job = request(runs_dir=tmp_path / "runs")
    with pytest.raises(SchedulerError, match=r"sbatch is not on this machine(.|\n)*fix: .*cluster=local"):
        BACKEND.submit(job, BACKEND.render(job))


def test_a_sweep_is_split_at_the_highest_index() -> None:
    sizes = [len(c) for c in chunks(range(1000), 1001)]
    assert sizes == [1000]
    assert [len(c) for c in chunks(range(1001), 1001)] == [1001]
    assert [len(c) for c in chunks(range(1002), 1001)] == [501, 501]
    parts = chunks(range(2500), 1001)
    assert [len(c) for c in parts] == [834, 833, 833]
    assert [item for part in parts for item in part] == list(range(2500))
    assert chunks([], 1001) == ()


def test_the_throttle_is_shared() -> None:
    assert throttles(100, 3) == (34, 33, 33)
    assert throttles(2, 3) == (1, 1, 1)


def test_backends_are_found_by_kind() -> None:
    assert backends.get("slurm") is BACKEND
    assert type(backends.get("local")).__name__ == "LocalBackend"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", ["torchrun.sbatch", "array.sbatch", "interactive.sh"])
def test_shellcheck(name: str) -> None:
    file = template.path().parent / name
    done = subprocess.run(["shellcheck", "-x", file], capture_output=True, text=True, cwd=file.parent.parent)
    assert done.stdout == ""


def test_no_absolute_path_of_this_machine_in_the_templates() -> None:
    for file in template.path().parent.iterdir():
        assert not re.search(r"/(home|work|root|tmp|Users)/", file.read_text())
