from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from hpcdl.errors import SchedulerError
from hpcdl.runs import slurm_text
from hpcdl.runs.scheduler import Slurm, run_command, with_comment
from tests.runs.making import FakeJob, FakeSlurm


def test_running_and_pending_tasks_of_an_array_in_one_call(fake: FakeSlurm) -> None:
    fake.jobs["4"] = [
        FakeJob("PENDING", "3-30%2", "JobArrayTaskLimit"),
        FakeJob("RUNNING", "2", start="2026-11-22T22:33:01", nodes="c[1-2]"),
    ]
    answer = fake.slurm().ask(["4_2", "4_3", "4_30"])
    assert fake.names() == ["squeue"]
    assert answer.jobs["4_2"].state == "RUNNING"
    assert answer.jobs["4_2"].node_list == ("c1", "c2")
    assert answer.jobs["4_2"].start == "2026-11-22T22:33:01.000+00:00"
    assert answer.jobs["4_3"].reason == answer.jobs["4_30"].reason == "JobArrayTaskLimit"


def test_the_last_running_task_is_matched_by_its_task_number(fake: FakeSlurm) -> None:
    # Slurm gives an array's last task the array's own job id.
    fake.jobs["4"] = [FakeJob("CANCELLED", "0"), FakeJob("RUNNING", "1")]
    answer = fake.slurm().ask(["4_0", "4_1"])
    assert {i: job.state for i, job in answer.jobs.items()} == {"4_0": "CANCELLED", "4_1": "RUNNING"}


def test_a_job_without_array(fake: FakeSlurm) -> None:
    fake.jobs["7"] = [FakeJob("RUNNING")]
    answer = fake.slurm().ask(["7", "7_0"])
    assert answer.jobs["7"].state == answer.jobs["7_0"].state == "RUNNING"


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [("COMPLETED", "0:0", 0), ("FAILED", "3:0", 3), ("OUT_OF_MEMORY", "0:125", 253), ("FAILED", "0:9", 137)],
)
def test_the_exit_code_comes_from_scontrol(fake: FakeSlurm, state: str, code: str, expected: int) -> None:
    fake.jobs["4"] = [FakeJob(state, "0", code=code)]
    job = fake.slurm().ask(["4_0"]).jobs["4_0"]
    assert fake.names() == ["squeue", "scontrol"]
    assert (job.state, job.exit_code, job.source) == (state, expected, "scontrol")


def test_a_forgotten_job_is_found_in_the_accounting(fake: FakeSlurm) -> None:
    fake.accounting = True
    fake.jobs["4"] = [FakeJob("CANCELLED by 1000", "0-8", forgotten=True)]
    answer = fake.slurm().ask(["4_7"])
    assert fake.names() == ["squeue", "scontrol", "sacct"]
    job = answer.jobs["4_7"]
    assert (job.state, job.reason, answer.away) == ("CANCELLED", "by 1000", "")


def test_a_forgotten_job_without_accounting_is_unknown_and_slurm_not_away(fake: FakeSlurm) -> None:
    fake.jobs["4"] = [FakeJob("COMPLETED", "0", forgotten=True)]
    answer = fake.slurm().ask(["4_0"])
    assert answer.jobs == {}
    assert answer.away == ""


def test_an_open_row_of_the_accounting_is_no_answer(fake: FakeSlurm) -> None:
    fake.accounting = True
    fake.jobs["4"] = [FakeJob("RUNNING", "0", forgotten=True)]
    assert fake.slurm().ask(["4_0"]).jobs == {}


def test_the_controller_is_away(fake: FakeSlurm) -> None:
    fake.away = True
    fake.jobs["4"] = [FakeJob("RUNNING", "0")]
    answer = fake.slurm().ask(["4_0"])
    assert answer.jobs == {}
    assert "Unable to contact slurm controller" in answer.away


def test_the_accounting_answers_for_an_absent_controller(fake: FakeSlurm) -> None:
    fake.away, fake.accounting = True, True
    fake.jobs["4"] = [FakeJob("TIMEOUT", "0", code="0:0")]
    answer = fake.slurm().ask(["4_0"])
    assert answer.jobs["4_0"].state == "TIMEOUT"


@pytest.mark.parametrize("word", ["NODE_FAIL", "PREEMPTED"])
def test_what_slurm_may_queue_again_is_no_end_while_the_controller_is_away(
    fake: FakeSlurm, word: str
) -> None:
    """As it was with a node that was cut off: slurmdbd has the try's end before the job is in the queue again."""
    fake.away, fake.accounting = True, True
    fake.jobs["4"] = [FakeJob(word, "0", nodes="c3")]
    assert fake.slurm().ask(["4_0"]).jobs == {}
    fake.away, fake.jobs["4"][0].forgotten = False, True
    assert fake.slurm().ask(["4_0"]).jobs["4_0"].state == word


def test_a_thousand_runs_take_one_call(fake: FakeSlurm) -> None:
    fake.jobs["4"] = [FakeJob("PENDING", "0-999")]
    assert len(fake.slurm().ask([f"4_{i}" for i in range(1000)]).jobs) == 1000
    assert fake.names() == ["squeue"]


def test_find_by_comment(fake: FakeSlurm) -> None:
    fake.jobs["8"] = [FakeJob("PENDING", "0-3", comment="hpcdl:tokA")]
    fake.jobs["9"] = [FakeJob("RUNNING", comment="(null)")]
    assert fake.slurm().find({"tokA", "tokB"}) == ({"tokA": ("8",)}, "")


def test_scancel_that_fails_says_so(fake: FakeSlurm) -> None:
    fake.away = True
    with pytest.raises(SchedulerError, match="Unable to contact"):
        fake.slurm().cancel(["4_0"])


def _script(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_real_commands_get_a_clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _script(
        tmp_path / "bin",
        "squeue",
        'echo "4|0|RUNNING|2026-01-01T00:00:00|c1|None|$TZ$SLURM_BITSTR_LEN$SQUEUE_STATES"',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")
    assert Slurm().ask(["4_0"]).jobs["4_0"].comment == "UTC0"


def test_no_squeue_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "squeue is not on this machine" in Slurm().ask(["4_0"]).away


def test_a_command_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _script(tmp_path / "bin", "squeue", "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    done = run_command(["squeue"], "", 0.2)
    assert (done.returncode, done.stderr) == (124, "squeue gave no answer within 0.2 s")


# --- answers that are none


def answers(fake: FakeSlurm, **spoiled: tuple[int, str, str]) -> Slurm:
    """A Slurm of which some commands give this exit code, output and error; `cut:` keeps so much of the output."""

    def run(command: Sequence[str], text: str, limit_s: float) -> subprocess.CompletedProcess[str]:
        done = fake.run(command, text, limit_s)
        code, out, err = spoiled.get(command[0], (done.returncode, done.stdout, done.stderr))
        if out.startswith("cut:"):
            out = done.stdout[: int(out.removeprefix("cut:"))]
        return subprocess.CompletedProcess(command, code, out, err)

    return Slurm(runner=run)


GARBAGE = "\x00<html>504 Gateway Time-out</html>\nJobId= JobState=\n|||||||\n4|0|run|x|c[a-|None|\n"


@pytest.mark.parametrize(
    "spoiled",
    [
        {"squeue": (0, "", ""), "scontrol": (0, "", "")},
        {"squeue": (0, GARBAGE, ""), "scontrol": (0, GARBAGE, "")},
        {"squeue": (0, "cut:30", ""), "scontrol": (0, "cut:60", "")},
        {
            "squeue": (0, "cut:9", ""),
            "scontrol": (1, "cut:100", "slurm_receive_msg: Zero Bytes were transmitted"),
        },
        {"squeue": (1, "cut:30", "slurm_load_jobs error: Socket timed out")},
        {"squeue": (0, "", ""), "scontrol": (124, "", "scontrol gave no answer within 15 s")},
        {"squeue": (-9, "", "")},
        {"squeue": (1, GARBAGE, GARBAGE)},
    ],
)
def test_an_answer_that_is_not_whole_is_no_answer(
    fake: FakeSlurm, spoiled: dict[str, tuple[int, str, str]]
) -> None:
    fake.jobs["4"] = [FakeJob("RUNNING", "0", start="2026-01-01T10:00:00", nodes="c1")]
    answer = answers(fake, **spoiled).ask(["4_0"])
    assert answer.jobs == {} and answer.away, "not «Slurm knows no such job»"


@pytest.mark.parametrize("cut", range(0, 58, 3))
def test_wherever_squeue_is_cut_short_the_state_is_true(fake: FakeSlurm, cut: int) -> None:
    fake.jobs["4"] = [FakeJob("RUNNING", "0", start="2026-01-01T10:00:00", nodes="c1")]
    answer = answers(fake, squeue=(0, f"cut:{cut}", "")).ask(["4_0"])
    assert answer.jobs["4_0"].state == "RUNNING", "scontrol says so"
    assert not answer.away


def test_what_is_denied_in_so_many_words_is_believed(fake: FakeSlurm) -> None:
    fake.jobs["4"] = [FakeJob("RUNNING", "1"), FakeJob("COMPLETED", "0", forgotten=True)]
    answer = fake.slurm().ask(["4_0", "4_1", "5_0", "6"])
    assert set(answer.jobs) == {"4_1"} and not answer.away
    spoiled = answers(fake, scontrol=(1, "", "slurm_load_jobs error: Invalid job id specified"))
    assert spoiled.ask(["4_0", "5_0", "6"]).away, "one denial for three jobs"


@pytest.mark.parametrize(
    ("out", "err", "away"),
    [
        ("Job 4_0 not found\n", "", ""),  # 22.05, 24.11
        ("", "Job 4_0 not found\n", ""),  # 26.05
        ("", "slurm_load_jobs error: Invalid job id specified\n", ""),
        ("", "", "scontrol ended with code 1 and said nothing"),
    ],
)
def test_a_task_that_its_array_has_no_more(fake: FakeSlurm, out: str, err: str, away: str) -> None:
    fake.jobs["4"] = [FakeJob("RUNNING", "1")]

    def run(command: Sequence[str], text: str, limit_s: float) -> subprocess.CompletedProcess[str]:
        if "show job 4_0" in text:
            return subprocess.CompletedProcess(command, 1, out, err)
        return fake.run(command, text, limit_s)

    answer = Slurm(runner=run).ask(["4_0", "4_1"])
    assert (set(answer.jobs), answer.away) == ({"4_1"}, away)


@pytest.mark.parametrize("out", [GARBAGE, "cut:5", "8|hpcdl:tok"])
def test_a_submission_that_is_not_seen_in_half_an_answer_may_be_there(fake: FakeSlurm, out: str) -> None:
    fake.jobs["8"] = [FakeJob("PENDING", "0-3", comment="hpcdl:tokA")]
    found, away = answers(fake, squeue=(0, out, "")).find({"tokA"})
    assert found == {} and away == "squeue's answer was not whole"


def test_all_jobs_of_one_submission_are_found(fake: FakeSlurm) -> None:
    fake.jobs["12"] = [FakeJob("PENDING", "0", comment="hpcdl:tokA")]
    fake.jobs["9"] = [FakeJob("RUNNING", "0", comment="hpcdl:tokA")]
    assert fake.slurm().find({"tokA"}) == ({"tokA": ("9", "12")}, "")


def test_a_comment_cut_short_is_still_ours() -> None:
    job = slurm_text.Job(state="RUNNING", comment="hpcdl:to")
    assert with_comment(job, "tokA") is job
    assert with_comment(dataclasses.replace(job, comment="hpcdl:tokB"), "tokA") is None


def test_scancel_of_a_forgotten_job_hides_no_other_fault(tmp_path: Path) -> None:
    def run(command: Sequence[str], text: str, limit_s: float) -> subprocess.CompletedProcess[str]:
        words = "scancel: error: Kill job error on job id 4: Invalid job id specified\n" + more
        return subprocess.CompletedProcess(command, 1, "", words)

    more = ""
    Slurm(runner=run).cancel(["4_0", "5_0"])
    more = "scancel: error: Kill job error on job id 5: Unable to contact slurm controller\n"
    with pytest.raises(SchedulerError, match="Unable to contact"):
        Slurm(runner=run).cancel(["4_0", "5_0"])


def test_a_command_that_is_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "squeue").write_text("")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}")
    assert "Exec format error" in Slurm().ask(["4_0"]).away
