from __future__ import annotations

from pathlib import Path

import pytest

from hpcdl.errors import ConfigError, UsageError
from hpcdl.launch import by_hand
from hpcdl.runs.store import RunDir
from hpcdl.spec import ClusterSpec
from hpcdl.spec.plain import from_plain, load_yaml

TINY = ["+experiment=pretrain_tiny", "trainer.micro_batch_size=2"]
JOB = {"SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "4"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_of(runs_file: Path) -> RunDir:
    (line,) = runs_file.read_text().splitlines()
    return RunDir(Path(line))


def test_the_first_start_composes_and_claims(tmp_path: Path) -> None:
    file = by_hand.find([*TINY, "cluster.processes_per_node=2"], JOB)
    assert file == tmp_path / "runs" / ".submissions" / "hand-41" / "runs.txt"
    run = run_of(file)
    state = run.read_state()
    assert (state.state, state.job_id, state.submission, state.array_index) == ("PENDING", "41", "hand-41", 0)
    cluster = from_plain(ClusterSpec, load_yaml(run.spec_file)["cluster"])
    # What the job has goes before the files.
    assert (cluster.kind, cluster.nodes, cluster.processes_per_node, cluster.cpus_per_process) == (
        "slurm",
        2,
        2,
        2,
    )
    assert "    srun --export=ALL" in run.job_file.read_text()


def test_a_requeued_job_composes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = by_hand.find(TINY, JOB)
    monkeypatch.setattr(by_hand, "_first_start", None)  # would be called, and fail
    assert by_hand.find(TINY, {**JOB, "SLURM_RESTART_COUNT": "1"}) == first


def test_a_requeued_job_that_died_before_it_composed_does_so_now() -> None:
    assert by_hand.find(TINY, {**JOB, "SLURM_RESTART_COUNT": "1"}) is not None


def test_each_array_task_takes_its_point() -> None:
    sweep = [*TINY, "seed=3,5"]
    seeds = []
    for task in ("0", "1"):
        file = by_hand.find(sweep, {**JOB, "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": task})
        assert file is not None
        run = run_of(file)
        assert run.read_state().job_id == f"40_{task}"
        seeds.append(load_yaml(run.spec_file)["seed"])
    assert seeds == [3, 5]
    with pytest.raises(UsageError, match="the sweep has 2 points; there is none for array task 2"):
        by_hand.find(sweep, {**JOB, "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2"})


def test_a_run_that_another_job_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcdl.runs.reconcile.reconcile", lambda views: views)
    by_hand.find(TINY, JOB)
    with pytest.raises(UsageError, match="is PENDING already, as job 41"):
        by_hand.find(TINY, {**JOB, "SLURM_JOB_ID": "42"})


def test_a_complete_run_is_not_run_again(capsys: pytest.CaptureFixture[str]) -> None:
    file = by_hand.find(TINY, JOB)
    assert file is not None
    run_of(file).update(state="COMPLETED")
    assert by_hand.main(TINY, {**JOB, "SLURM_JOB_ID": "42"}) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "is complete already; force=true makes a new run" in said.err


def test_faults_are_shown_as_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError):
        by_hand.find([*TINY, "trainer.max_stepz=3"], JOB)
    assert by_hand.main([*TINY, "trainer.max_stepz=3"], JOB) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "trainer.max_steps" in said.err


@pytest.mark.parametrize(
    ("overrides", "environment", "words"),
    [
        ([], {}, "there is no Slurm job here"),
        ([*TINY, "cluster=local"], JOB, "leave cluster=local out"),
        (
            [*TINY, "cluster.container=apptainer", "cluster.container_image=docker://x"],
            JOB,
            "fill HPCDL_INSIDE in",
        ),
        ([*TINY, "after=40"], JOB, "sbatch --dependency=afterok:JOB"),
    ],
)
def test_refusals(overrides: list[str], environment: dict[str, str], words: str) -> None:
    if environment:
        environment = {**environment, "SLURM_JOB_NUM_NODES": "1"}
    with pytest.raises(UsageError, match=words):
        by_hand.find(overrides, environment)


def test_runs_dir_of_the_command_line(tmp_path: Path) -> None:
    overrides = [*TINY, f"runs_dir={tmp_path}/elsewhere"]
    first = by_hand.find(overrides, JOB)
    assert first == tmp_path / "elsewhere" / ".submissions" / "hand-41" / "runs.txt"
    assert by_hand.find(overrides, {**JOB, "SLURM_RESTART_COUNT": "1"}) == first
