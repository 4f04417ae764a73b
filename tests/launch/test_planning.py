"""What a launch plans, what it refuses, and what it says would fit."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from hpcdl import cli
from hpcdl.errors import ConfigError
from hpcdl.launch import expected, planning, points, sweep
from hpcdl.launch.__main__ import main
from hpcdl.launch.compose import Composer
from hpcdl.plan import memory, nodes
from hpcdl.runs.store import RunDir
from tests.fake_slurm import FakeSlurm

SMALL = ("+experiment=pretrain_tiny", "cluster=slurm", "cluster.mem_gb=2")
BIG = (*SMALL, "data.seq_len=1024", "trainer.global_batch_size=256", "trainer.micro_batch_size=256")
"""About 12 GiB of 2."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to launch in, and no answer of Slurm from another test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nodes, "LIMIT_S", 120.0)
    monkeypatch.setattr(expected, "LIMIT_S", 120.0)
    nodes.ask.cache_clear()
    nodes.defaults.cache_clear()
    nodes.configuration.cache_clear()
    return tmp_path


def fixes(said: str) -> list[str]:
    """The overrides that an error names."""
    lines = said.partition("fix:")[2].partition("\n\n")[0].splitlines()
    return [line.strip().partition("  (")[0] for line in lines if line.strip()]


def nodes_of(change: str) -> int:
    """How many nodes a change asks for: a quicker step on more of them is no cheaper."""
    found = re.search(r"cluster\.nodes=(\d+)", change)
    return int(found[1]) if found else 1


def test_what_cannot_fit_is_refused_before_anything_is_submitted(
    slurm: FakeSlurm, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(BIG) == 2
    said = capsys.readouterr().err
    assert re.search(r"1\. memory = [\d.]+ GiB a process", said)
    assert "2.0 GiB a process: cluster.mem_gb" in said
    assert not slurm.calls("sbatch")
    assert not (folder / "runs").exists()


def test_each_change_that_is_named_makes_it_fit_and_they_go_up_in_cost(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(BIG) == 2
    said = capsys.readouterr().err
    *changes, forced = fixes(said)
    assert len(changes) == 3
    assert forced == "force_fit=true to submit it all the same"
    steps = [float(number) for number in re.findall(r"step ([\d.]+) s,", said)]
    assert len(steps) == 3
    # the last resort stands last, whatever it costs
    last = [step for change, step in zip(changes, steps, strict=True) if "data.seq_len" in change]
    asked = steps[: len(steps) - len(last)]
    assert steps[len(asked) :] == last
    costs = [step * nodes_of(change) for step, change in zip(asked, changes, strict=False)]
    assert costs == sorted(costs)
    assert len(asked) >= 1
    for change in changes:
        typed = change.split()
        keys = {word.partition("=")[0] for word in typed}
        kept = [word for word in BIG if word.partition("=")[0] not in keys]
        assert main([*kept, *typed, "dry_run=true"]) == 0, change
    assert not slurm.calls("sbatch")


def test_what_is_far_too_big_is_told_all_that_it_takes(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """No three changes are enough: as many as it takes, and none that it could do without."""
    far = (
        "+experiment=pretrain_tiny",
        "model=llama3_8b",
        "cluster=slurm",
        "cluster.mem_gb=17",
        "cluster.processes_per_node=2",
    )
    far += (
        "cluster.partition=small",
        "+cluster.partitions.small.mem_gb=17",
        "+cluster.partitions.small.nodes=1",
    )
    assert main(far) == 2
    change, forced = fixes(capsys.readouterr().err)
    typed = change.split()
    assert len(typed) > 3 and forced.startswith("force_fit=true")
    assert main([*far, *typed, "dry_run=true"]) == 0
    capsys.readouterr()
    for word in typed:
        if word.partition("=")[0] in ("cluster.processes_per_node", "trainer.precision"):
            assert main([*far, *(other for other in typed if other != word), "dry_run=true"]) == 2, word


def test_force_fit_submits_it_and_is_recorded(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BIG, "force_fit=true", "parsable=true"]) == 0
    out, err = capsys.readouterr()
    (run,) = (RunDir(Path(line.split("\t")[2])) for line in out.splitlines())
    (event,) = (event for event in run.events() if event["event"] == "submitted")
    assert "of 2.0 GiB a process" in event["force_fit"]
    assert "force_fit=true" in err
    assert "force_fit" not in run.spec_file.read_text()


def test_what_fits_is_no_event(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "force_fit=true"]) == 0
    out, err = capsys.readouterr()
    assert re.search(
        r"^plan       [\d.]+ [MG]iB of 2.0 GiB a process \(fits\), step .* steps in about", out, re.M
    )
    assert err == ""
    (run,) = (
        RunDir(path.parent) for path in Path("runs").glob("*/*/state.json") if not path.parent.is_symlink()
    )
    (event,) = (event for event in run.events() if event["event"] == "submitted")
    assert "force_fit" not in event
    assert 400 * 2**20 < event["planned"]["peak_bytes"] < 700 * 2**20
    assert event["planned"]["run_s"] > 40 * event["planned"]["step_s"] > 0
    assert cli.main(["status", "latest"]) == 0
    assert re.search(r"planned +peak [\d.]+ [MG]iB, step [\d.]+ s, in all \d", capsys.readouterr().out)


def test_what_is_within_the_plans_error_is_warned_of(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    peak = read(*SMALL).planned[0].plan.peak.peak  # type: ignore[union-attr]
    little = f"cluster.mem_gb={0.95 * peak / 2**30:.4f}"
    assert main([*SMALL[:2], little, "dry_run=true"]) == 0
    out, err = capsys.readouterr()
    assert "warning: memory may not fit" in err
    assert "(may not fit)" in out


def read(*argv: str, multirun: bool = False) -> planning.Fitting:
    composer = Composer()
    asked = sweep.read(composer, argv, multirun=multirun)
    return planning.fitting(points.plan(asked.points, asked.options), asked, composer)


def test_of_a_sweep_the_points_that_cannot_fit_are_left_out() -> None:
    words = [word for word in BIG if not word.startswith("trainer.micro")]
    found = read(*words, "trainer.micro_batch_size=256,1,128", multirun=True)
    assert [item.labels for item in found.planned] == [("trainer.micro_batch_size=1",)]
    assert [one.label for one in found.asked.refused] == [
        "trainer.micro_batch_size=256",
        "trainer.micro_batch_size=128",
    ]
    assert [one.number for one in found.asked.refused] == [0, 2]
    assert all(len(one.faults[0].fixes) == 4 for one in found.asked.refused)
    with pytest.raises(ConfigError, match="2 faults"):
        read(*words, "trainer.micro_batch_size=256,1,128", "strict=true", multirun=True)
    with pytest.raises(ConfigError, match="micro_batch_size=256"):
        read(*words, "trainer.micro_batch_size=256,128", multirun=True)


def test_points_that_differ_in_nothing_that_matters_have_one_plan() -> None:
    found = read(*SMALL, "seed=range(0,20)", "optim.lr=1e-3,1e-4", multirun=True)
    assert len(found.planned) == 40
    assert len({id(item.plan) for item in found.planned}) == 1


def test_a_run_that_is_there_is_not_planned_and_never_refused(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*BIG, "force_fit=true"]) == 0
    assert main([*BIG]) == 0  # it is found, and nothing is submitted
    assert len(slurm.calls("sbatch")) == 1


def test_of_a_run_of_which_nothing_is_known_nothing_is_claimed(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "ranks", lambda *_: None)
    assert main([*BIG, "dry_run=true"]) == 0
    out, err = capsys.readouterr()
    assert "# plan: memory unknown" in out
    assert not err


def test_an_unknown_gpu_is_a_fault(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "cluster.gpus_per_node=1", "cluster.gpu=h1000"]) == 2
    assert "cluster.gpu = h1000" in capsys.readouterr().err


# --- expected start -------------------------------------------------------------------------------------------

NOW = datetime(2026, 1, 31, 11, 0, tzinfo=UTC)
AT = "2026-01-31T12:30:00"


@pytest.mark.parametrize(
    "said",
    [
        f"sbatch: Job 7 to start at {AT} using 4 processors on nodes c[1-2] in partition debug",
        f"sbatch: Job 7 to start at {AT} using 4 processors on c[1-2]",
        f"sbatch: warning: something\nsbatch: Job 7 to start at {AT} on cluster one using 4 processors on nodes c[1-2]",
    ],
)
def test_the_start_in_all_wordings(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("TZ", "UTC")
    found = expected.start(
        "#!/bin/sh",
        runner=lambda command, text, limit: CompletedProcess(command, 0, "", said),
        now=lambda: NOW,
    )
    assert found.time == "2026-01-31T12:30:00+00:00"
    assert found.said.startswith("in 1h, ")
    assert "on c[1-2]" in found.said


def test_a_job_that_cannot_start_is_told_in_slurms_words(slurm: FakeSlurm) -> None:
    slurm.set(refuse="Requested node configuration is not available")
    found = expected.start("#!/bin/sh")
    assert (found.time, found.said) == (
        None,
        "unknown: allocation failure: Requested node configuration is not available",
    )


def test_without_slurm_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert expected.start("#!/bin/sh") == expected.Expected()


def test_a_dry_run_asks_for_the_very_script(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "dry_run=true"]) == 0
    out = capsys.readouterr().out
    (call,) = slurm.calls("test_only")
    assert out.startswith(call["script"])
    assert call["timezone"] == "UTC"
    assert re.search(r"^# plan: .* starts in \d+d, .* on n1, Slurm says", out, re.M)
    assert not slurm.calls("sbatch")


def test_a_launch_does_not_wait_for_that(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL]) == 0
    assert not slurm.calls("test_only")


# --- hpcdl plan -----------------------------------------------------------------------------------------------


def test_the_command_shows_what_a_launch_would_refuse(
    slurm: FakeSlurm, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *BIG]) == 0
    out = capsys.readouterr().out
    assert "doesn't fit" in out
    assert "activations" in out
    assert not (folder / "runs").exists()
    assert not slurm.calls("sbatch")


def test_the_command_has_the_faults_of_a_launch(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *SMALL, "trainer.max_stesp=3"]) == 2
    assert "trainer.max_steps=3" in capsys.readouterr().err
    assert cli.main(["plan", *SMALL, "trainer.max_steps=3,4"]) == 2
    assert "needs -m" in capsys.readouterr().err
    assert cli.main(["plan", *SMALL, "cluster.gpu=h1000"]) == 2


def test_the_command_for_scripts(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *BIG, "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert (one["fits"], one["verdict"], one["limit_bytes"]) == (False, "too big", 2 * 2**30)
    assert one["start"] == "2030-01-31T12:00:00+00:00"
    assert cli.main(["plan", "-m", *SMALL, "trainer.micro_batch_size=4,8,3", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [each["overrides"] for each in json.loads(out)] == [
        "trainer.micro_batch_size=4",
        "trainer.micro_batch_size=8",
    ]
    assert "refused: trainer.micro_batch_size=3" in err


def test_the_command_for_a_sweep_has_a_line_a_point(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "-m", *SMALL, "trainer.micro_batch_size=8,4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == [
        "trainer.micro_batch_size=8",
        "trainer.micro_batch_size=4",
    ]
    assert len(slurm.calls("test_only")) == 1  # one shape, one question
