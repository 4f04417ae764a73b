"""`after=RUN[,RUN]`: what is waited for, and what becomes of those that wait in vain."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from hpcdl.launch import after, begin, dependents, place, waiting
from hpcdl.launch.__main__ import main
from hpcdl.runs import parents, wish
from hpcdl.runs.parents import Parent
from hpcdl.runs.reconcile import look
from hpcdl.runs.store import RunDir
from tests.fake_slurm import FakeSlurm

TINY = ("+experiment=pretrain_tiny", "tracker=none", "parsable=true")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(capsys: pytest.CaptureFixture[str], *words: str) -> list[tuple[RunDir, str]]:
    assert main([*TINY, "cluster=slurm", *words]) == 0, capsys.readouterr().err
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    return [(RunDir(Path(path)), job_id) for _, job_id, path in lines]


def dependency(slurm: FakeSlurm) -> str:
    script = slurm.calls("sbatch")[-1]["script"]
    return next((line.partition("=")[2] for line in script.splitlines() if "--dependency" in line), "")


def end(run: RunDir, state: str, reason: str = "") -> None:
    run.update(state=state, reason=reason)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("after=a,b", "after='a,b'"),
        ("after=[a,b]", "after='a,b'"),
        ("after=123_4", "after='123_4'"),
        ("after='a'", "after='a'"),
        ("after=null", "after=null"),
        ("after=runs/it's/x", "after='runs/it\\'s/x'"),
        ("name=after=x", "name=after=x"),
    ],
)
def test_it_is_one_text_for_hydra(text: str, expected: str) -> None:
    assert after.spelled(text) == expected


def test_by_every_name_a_run_has(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    ((run, job_id),) = launch(capsys)
    for seed, name in enumerate(
        [run.path.name, run.path.name[:6], job_id, "pretrain_tiny", "latest", str(run.path)]
    ):
        launch(capsys, f"seed={seed + 1}", "name=other", f"after={name}", f"runs_dir={run.runs_dir}")
        expected = job_id if name != "latest" else f"{seed + 1}_0"
        assert dependency(slurm) == f"afterok:{expected}", name


def test_several_and_a_strangers_job(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    (a, job_a), (b, job_b), (c, _) = launch(capsys, "-m", "seed=1,2,3")
    end(c, "COMPLETED")
    launch(capsys, "seed=4", f"after={a.path.name},{b.path.name},{c.path.name},4711")
    assert dependency(slurm) == f"afterok:{job_a}:{job_b}:4711"
    launch(capsys, "-m", "seed=5,6", f"after={a.path.name},{b.path.name}")
    assert dependency(slurm) == f"afterok:{job_a}:{job_b}"


def test_a_whole_sweep(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    runs = launch(capsys, "-m", "seed=1,2,3")
    (file,) = Path("runs/.sweeps").iterdir()
    launch(capsys, "seed=4", f"after={file.stem}")
    assert dependency(slurm) == "afterok:" + ":".join(job_id for _, job_id in runs)
    launch(capsys, "seed=5", "after=1")
    assert dependency(slurm).count(":") == 3, "an array's own id: all its tasks"


def test_a_parent_that_is_complete_needs_no_waiting(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    ((run, _),) = launch(capsys)
    end(run, "COMPLETED")
    ((child, _),) = launch(capsys, "seed=2", f"after={run.path.name}")
    assert dependency(slurm) == ""
    assert not parents.of_submission(child.runs_dir, child.read_state().submission)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["after=nobody"], ["after = nobody", "no run is called nobody"]),
        (["after=nobody,noone"], ["2 faults", "nobody", "noone"]),
        (["after=failed_one"], ["is FAILED and will not succeed: boom", "hpcdl resubmit"]),
        (["after=failed_one,"], ["a name is missing between the commas", "boom"]),
        (["after=4711", "cluster=local"], ["after = 4711"]),
    ],
)
def test_what_cannot_be_waited_for(
    words: list[str], parts: list[str], slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    ((run, _),) = launch(capsys, "name=failed_one")
    end(run, "FAILED", "boom")
    assert main([*TINY, "cluster=slurm", "seed=9", *words]) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in parts), err
    assert len(slurm.calls("sbatch")) == 1


# --- those that wait, while they wait and in vain


def chain(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> tuple[RunDir, RunDir]:
    ((train, _),) = launch(capsys, "name=train")
    ((child, _),) = launch(capsys, "name=eval", f"after={train.path.name}")
    return train, child


def test_while_it_waits(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    train, child = chain(slurm, capsys)
    for told in ("", "Dependency"):  # Slurm gives no reason before its scheduler has looked at a new job.
        slurm.change("2_0", reason=told)
        assert look(child).state.reason == f"Dependency: waits for {train.path.name} (train), PENDING"


@pytest.mark.parametrize("forgotten", [False, True])
def test_one_that_waited_in_vain_is_cancelled_with_the_parents_name(
    forgotten: bool, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    train, child = chain(slurm, capsys)
    end(train, "TIMEOUT", "the job reached its time limit")
    slurm.change("2_0", state="CANCELLED", reason="DependencyNeverSatisfied")
    if forgotten:
        slurm.forget("2")
    state = look(child).state
    assert state.state == "CANCELLED"
    assert state.reason.startswith(
        f"{train.path.name} (train), which it waited for, is TIMEOUT: the job reached its time limit"
    )
    assert child.events()[-1] | {"time": ""} == {
        "time": "", "event": "cancelled", "found_by": "poll", "by": "dependency", "reason": state.reason
    }  # fmt: skip


def test_a_user_who_cancels_a_waiting_run_is_told_so(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    _, child = chain(slurm, capsys)
    slurm.change("2_0", state="CANCELLED", reason="None")
    assert look(child).state.reason == "cancelled while pending; it will never write a log"


# --- a dependent that Slurm has let start looks at the runs themselves


def begins(child: RunDir, job: int = 2, node: int = 0, restarts: int = 0) -> int | None:
    state = child.read_state()
    names = {
        "JOB_ID": job,
        "ARRAY_JOB_ID": job,
        "ARRAY_TASK_ID": 0,
        "NODEID": node,
        "RESTART_COUNT": restarts,
    }
    environment = {f"SLURM_{name}": str(value) for name, value in names.items()}
    runs_file = child.runs_dir / ".submissions" / str(state.submission) / "runs.txt"
    return begin.nothing_to_do(child, place.find(runs_file, None, environment))


def test_it_begins_when_they_have_succeeded(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    train, child = chain(slurm, capsys)
    end(train, "COMPLETED")
    assert begins(child) is None


def test_it_does_not_begin_when_they_have_not(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    train, child = chain(slurm, capsys)
    end(train, "FAILED", "boom")
    assert begins(child) == 130
    state = child.read_state()
    assert (state.state, state.exit_code) == ("CANCELLED", 130)
    assert state.reason == f"{train.path.name} (train), which it waited for, is FAILED: boom"


def test_it_goes_back_while_they_go_on_in_another_job(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(begin, "SEEN_AFTER_S", 0.05)
    monkeypatch.setattr(begin, "POLL_S", 0.01)
    train, child = chain(slurm, capsys)
    end(train, "RUNNING")
    slurm.change("1_0", state="RUNNING")
    assert begins(child) == 0
    assert child.read_state().state == "PENDING"
    assert child.read_state().reason == f"waits for {train.path.name} (train), RUNNING"
    assert slurm.task("2_0")["restarts"] == 1, "in the queue again"
    assert begins(child, node=1) is None, "the first node's agent decides"
    slurm.set(requeue_refused="Job is not requeueable")
    assert begins(child, restarts=1) == 130
    assert "can't go back into the queue: Job is not requeueable" in child.read_state().reason


def test_a_task_that_left_no_record_is_found_to_be_gone(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cancelled while pending within its array: Slurm takes a wait for it as over, and starts the dependent."""
    (first, _), (gone, _) = launch(capsys, "-m", "seed=1,2")
    ((child, _),) = launch(capsys, "name=eval", f"after={first.path.name},{gone.path.name}")
    end(first, "COMPLETED")
    (slurm.folder / "tasks" / "1_1.json").unlink()
    assert begins(child) == 130
    reason = child.read_state().reason
    assert reason.startswith(f"{gone.path.name} (pretrain_tiny), which it waited for, is CANCELLED: "), reason


def test_a_second_job_has_nothing_to_do(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    ((run, _),) = launch(capsys)
    assert begins(run, job=1) is None
    assert begins(run, job=7) == begins(run, job=7, node=1) == 0
    assert "its job is 1: job 7 has nothing to do" in capsys.readouterr().err


def test_a_wish_to_cancel_ends_it_before_it_trains(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    ((run, _),) = launch(capsys)
    wish.make(run, now=False)
    assert begins(run, job=1) == 130
    assert (run.read_state().state, run.read_state().reason) == (
        "CANCELLED",
        "cancelled before it had started",
    )


# --- on this machine


def local(tmp_path: Path, train: RunDir) -> tuple[RunDir, Path]:
    from hpcdl.spec import ClusterSpec
    from tests.launch.making import make_runs

    (child,) = make_runs(tmp_path / "local", ClusterSpec(kind="local"))
    submission = child.runs_dir / ".submissions" / str(child.read_state().submission)
    parents.write(submission, [Parent(run=train, name=f"{train.path.name} (train)", job_id=None)])
    return child, submission / "runs.txt"


def finished(tmp_path: Path, state: str, **more: Any) -> RunDir:
    from tests.runs.making import make_run

    return make_run(tmp_path / "others", state=state, kind="local", name="train", submission=None, **more)


def test_the_shell_of_a_local_run_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = finished(tmp_path, "RUNNING", host="elsewhere", agent_pid=1)
    child, runs_file = local(tmp_path, train)
    monkeypatch.setattr(waiting, "POLL_S", 0.0)
    slept: list[str] = []

    def sleep(_: float) -> None:
        slept.append(child.read_state().reason)
        if len(slept) == 3:
            end(train, "COMPLETED")

    monkeypatch.setattr(waiting.time, "sleep", sleep)
    assert waiting.main([str(runs_file)]) == 0
    assert slept == [f"waits for {train.path.name} (train), RUNNING"] * 3
    assert (child.read_state().state, child.read_state().reason) == ("PENDING", "")


def test_and_ends_when_the_other_fails_or_nobody_waits_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = finished(tmp_path, "FAILED", reason="boom")
    child, runs_file = local(tmp_path, train)
    assert waiting.main([str(runs_file)]) == 130
    assert child.read_state().reason == f"{train.path.name} (train), which it waited for, is FAILED: boom"
    end(train, "RUNNING")
    train.update(host="elsewhere", agent_pid=1)
    end(child, "PENDING")
    wish.make(child, now=False)
    assert waiting.main([str(runs_file)]) == 130
    assert (child.read_state().state, child.read_state().reason) == ("CANCELLED", "cancelled while it waited")


def test_an_agent_that_died_without_a_word_is_noticed(tmp_path: Path) -> None:
    import os

    train = finished(tmp_path, "RUNNING", host=os.uname().nodename, agent_pid=2**22 - 1, agent_started=1.0)
    child, runs_file = local(tmp_path, train)
    assert waiting.main([str(runs_file)]) == 130
    assert "which it waited for, is FAILED: the agent, process" in child.read_state().reason


def test_the_local_script_waits_first(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ((run, _),) = launch(capsys)
    assert main([*TINY, "seed=2", f"after={run.path.name}", "dry_run=true"]) == 0
    text = capsys.readouterr().out
    assert text.index("-m hpcdl.launch.waiting") < text.index("-m hpcdl.launch.job")
    script = tmp_path / "x.sh"
    script.write_text(text)
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


# --- a run that goes on in another job takes along those that wait for it


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("afterok:12_0(unfulfilled)", "afterok:15_0"),
        ("afterok:9_1(unfulfilled),afterok:12_0(unfulfilled)", "afterok:9_1,afterok:15_0"),
        ("afterok:9_1:12_0(unfulfilled)", "afterok:9_1:15_0"),
        ("afterok:12_1(unfulfilled)", None),
        ("afterok:12_01(unfulfilled)", None),
        ("afterany:12_0(unfulfilled)", None),
        ("(null)", None),
    ],
)
def test_dependents_follow_the_run(text: str, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, f"20|(null)\n21|{text}\n", "")

    monkeypatch.setattr(dependents.control, "run", run)
    said: list[str] = []
    dependents.move("12_0", "15_0", said.append)
    assert calls[1:] == ([["scontrol", "update", "jobid=21", f"dependency={expected}"]] if expected else [])
    assert said == (["job 21 waits for 15_0 in the place of 12_0"] if expected else [])
