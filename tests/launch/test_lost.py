"""sbatch whose answer is lost, late, cut short or garbage: one job is made, found, and never a second one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hpcdl.errors import SchedulerError
from hpcdl.launch import lost
from hpcdl.launch.__main__ import main
from hpcdl.launch.slurm import BACKEND
from hpcdl.runs import patience, submissions
from hpcdl.runs.patience import Patience
from hpcdl.runs.reconcile import look
from hpcdl.runs.store import RunDir, decide_job, read_submission
from tests.fake_slurm import FakeSlurm
from tests.launch.making import TOKEN, request

TINY = ("+experiment=pretrain_tiny", "cluster=slurm", "tracker=none", "parsable=true")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same waits, a hundred times shorter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(patience.VARIABLE, "20")
    monkeypatch.setattr(patience, "FIRST_S", 0.01)
    monkeypatch.setattr(lost, "SETTLE_S", 0.01)


def submit(tmp_path: Path, count: int = 1) -> str | None:
    job = request(count, runs_dir=tmp_path / "runs")
    return BACKEND.submit(job, BACKEND.render(job))


@pytest.mark.parametrize("how", ["lost", "killed", "nothing", "cut", "failing"])
def test_a_job_that_was_taken_is_found_by_its_token(
    how: str, slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.set(modes={"sbatch": [how]})
    assert submit(tmp_path, 3) == "1"
    assert len(slurm.calls("sbatch")) == 1 and slurm.jobs() == ["1"]
    assert "Slurm has taken the job all the same: 1" in capsys.readouterr().err
    assert read_submission(tmp_path / "runs", TOKEN)["job_id"] == "1"


@pytest.mark.parametrize("how", ["away", "garbage"])
def test_one_that_was_not_taken_is_submitted_again(
    how: str, slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.set(modes={"sbatch": [how, how, "well"]})
    assert submit(tmp_path) == "1"
    assert slurm.jobs() == ["1"]
    said = capsys.readouterr().err.splitlines()
    assert [": no answer: " in line for line in said] == [True, False] * 2
    said = said[1::2]
    assert len(said) == 2 and all(
        "Slurm does not answer (" in line and "; next try in " in line for line in said
    )


def test_sbatch_that_hangs_is_ended(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpcdl.launch.slurm.SBATCH_LIMIT_S", 0.5)
    slurm.set(modes={"sbatch": ["hang", "taken_hang"]})
    assert submit(tmp_path) == "1"
    assert slurm.jobs() == ["1"]


def test_nothing_is_submitted_again_while_nobody_can_be_asked(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.set(modes={"sbatch": ["lost"], "squeue": ["away", "garbage", "failing", "cut", "well"]})
    assert submit(tmp_path) == "1"
    assert len(slurm.calls("sbatch")) == 1 and slurm.jobs() == ["1"]


def test_a_second_job_of_one_submission_is_cancelled(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The controller had the first one in its socket for longer than anybody looks."""
    slurm.set(modes={"sbatch": ["lost", "well"], "squeue": ["nothing", "nothing", "well"]})
    assert submit(tmp_path) == "2"
    decided = read_submission(tmp_path / "runs", TOKEN)["job_id"]
    assert decided == "2" and slurm.jobs() == ["1", "2"]
    # The first one, when its agent starts, or a look finds both.
    assert decide_job(tmp_path / "runs", TOKEN, "1") == "2", "it has nothing to do"
    submissions.settle(tmp_path / "runs", TOKEN, ["1", "2"], slurm_commands(), print)
    assert slurm.jobs() == ["2"]


def slurm_commands() -> submissions.Slurm:
    return submissions.Slurm()


def test_a_job_that_slurm_has_forgotten_is_found_by_its_files(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.set(modes={"sbatch": ["lost"], "squeue": ["away", "well"]})
    job = request(1, runs_dir=tmp_path / "runs")

    def ends_and_is_forgotten() -> None:
        while slurm.jobs() != ["1"]:
            time.sleep(0.005)
        (job.folder / "slurm-1_0.out").write_text("it ran, and failed before its agent could start\n")
        slurm.forget("1")

    thread = threading.Thread(target=ends_and_is_forgotten, daemon=True)
    (tmp_path / "slurm" / "tasks").mkdir(parents=True, exist_ok=True)
    thread.start()
    assert BACKEND.submit(job, BACKEND.render(job)) == "1"
    thread.join(timeout=10)
    assert len(slurm.calls("sbatch")) == 1


@pytest.mark.parametrize(
    "words",
    [
        "Batch job submission failed: Invalid partition name specified",
        "Batch job submission failed: Job violates accounting/QOS policy (job submit limit)",
        "Batch job submission failed: Requested node configuration is not available",
    ],
)
def test_a_refusal_is_final(words: str, slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.set(refuse=words)
    with pytest.raises(SchedulerError) as caught:
        submit(tmp_path)
    assert words in str(caught.value) and not isinstance(caught.value, lost.Unanswered)
    assert len(slurm.calls("sbatch")) == 1


NETWORK_CUT = """\
sbatch: error: get_addr_info: getaddrinfo() failed: Name or service not known: No error, attempt number -4
sbatch: error: get_addr_info: getaddrinfo() failed: Name or service not known: No error, attempt number -3
sbatch: error: get_addr_info: getaddrinfo() fAiled: Name or service not known
sbatch: error: slurm_set_addr: Unable to resolve "slurmctld"
sbatch: error: Unable to establish control machine address
sbatch: error: Batch job submission failed: No error
"""
"""What 22.05 says on a login node whose network was taken away (seen)."""


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (NETWORK_CUT, 1, "Unable to establish control machine address sbatch: error: Batch job"),
        (
            "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
            1,
            "timed out",
        ),
        (
            "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
            1,
            "Zero Bytes",
        ),
        ("sbatch: error: Batch job submission failed: Resource temporarily unavailable", 1, "unavailable"),
        ("", 1, "said nothing"),
        ("", -9, "sbatch was killed"),
        ("", 124, "no answer within 60 s"),
        ("", 137, "no answer within 60 s"),
    ],
)
def test_what_is_no_answer(text: str, code: int, words: str) -> None:
    error = RuntimeError(text)
    error.__cause__ = subprocess.CalledProcessError(code, "sbatch")
    told = lost.told(error)
    assert isinstance(told, lost.LostAnswer) and words in str(told) and "attempt number" not in str(told)


# --- the launcher as a whole


def the_run() -> RunDir:
    (state_file,) = Path("runs").glob("*/*/state.json")
    return RunDir(state_file.parent.absolute())


def test_a_launch_that_gets_no_answer_leaves_the_run_to_be_found(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(patience.VARIABLE, "0")
    slurm.set(modes={"sbatch": ["lost"], "squeue": ["away"]})
    assert main([*TINY]) == 3
    err = capsys.readouterr().err
    assert "Whether it has taken the job is not known yet" in err and "Traceback" not in err
    state = the_run().read_state()
    assert (state.state, state.job_id) == ("PENDING", None)
    slurm.set(down=True)
    view = look(the_run())
    assert view.state.state == "UNKNOWN" and "unknown since" in view.state.reason
    slurm.set(down=False, modes={})
    assert main([*TINY]) == 0, "the same launch finds it"
    assert capsys.readouterr().out.split("\t")[1] == "1_0"
    assert len(slurm.calls("sbatch")) == 1 and slurm.jobs() == ["1"]


def test_where_there_was_no_job_the_same_launch_submits(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(patience.VARIABLE, "0")
    slurm.set(down=True)
    assert main([*TINY]) == 3
    slurm.set(down=False)
    assert main([*TINY]) == 0
    assert the_run().read_state().attempt == 1
    assert slurm.jobs() == ["1"]


def test_killed_when_sbatch_has_answered_and_slurm_has_forgotten(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(submissions, "settle", lambda *_: os._exit(9))
        main([*TINY])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    run = the_run()
    token = str(run.read_state().submission)
    # The job starts, its agent fails to start, and nobody looks for MinJobAge.
    folder = run.runs_dir / ".submissions" / token
    (folder / "slurm-1_0.out").write_text("/usr/bin/env: bad interpreter\n")
    slurm.forget("1")
    view = look(run)
    assert (view.state.state, view.state.job_id) == ("FAILED", "1_0")
    assert "bad interpreter" in view.state.reason


def test_ctrl_c_while_it_waits(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.set(down=True)
    command = [sys.executable, "-m", "hpcdl.launch", *TINY]
    environment = {**os.environ, patience.VARIABLE: "60"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    assert "no answer: sbatch: error: Unable to contact" in process.stderr.readline()
    first = process.stderr.readline()
    assert "Slurm does not answer (" in first and "next try in 1 s" in first
    process.send_signal(2)
    rest = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and "interrupted while submitting" in rest and "Traceback" not in rest
    assert the_run().read_state().state == "PENDING"


# --- how long


def test_waits_grow_and_end() -> None:
    now, slept, said = [0.0], [], []

    def sleep(delay: float) -> None:
        slept.append(delay)
        now[0] += delay

    waits = Patience(60.0, say=said.append, sleep=sleep, clock=lambda: now[0])
    patience_first = patience.FIRST_S
    while waits.wait("connect failure"):
        pass
    assert sum(slept) == pytest.approx(60.0)
    assert slept[:4] == [patience_first * 2**i for i in range(4)] and max(slept) <= patience.MOST_S
    assert said[0].startswith("Slurm does not answer (connect failure); next try in ")


def test_the_environment_says_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.VARIABLE, "5")
    assert patience.of_environment() == 5.0
    monkeypatch.setenv(patience.VARIABLE, "long")
    assert patience.of_environment() == patience.LAUNCH_S


def test_the_record_keeps_what_others_have_written(tmp_path: Path) -> None:
    folder = tmp_path / ".submissions" / TOKEN
    folder.mkdir(parents=True)
    (folder / "submission.json").write_text(json.dumps({"token": TOKEN, "job_id": None, "pid": 7}))
    assert decide_job(tmp_path, TOKEN, "5") == "5"
    assert decide_job(tmp_path, TOKEN, "6") == "5"
    assert read_submission(tmp_path, TOKEN) == {"token": TOKEN, "job_id": "5", "pid": 7}
