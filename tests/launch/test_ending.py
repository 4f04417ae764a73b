from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcdl.launch.control import Fate, JobFate
from hpcdl.launch.ending import Ending, Outcome, Seen, decide, read_outcome

FINISHED = Outcome(status="finished", reason="", step=9)


def stopped(reason: str) -> Outcome:
    return Outcome(status="stopped", reason=reason, step=9)


def end(
    kind: str = "slurm",
    code: int = 0,
    outcome: Outcome | None = None,
    signals: tuple[str, ...] = (),
    fate: Fate | None = None,
    killed: bool = False,
) -> Ending:
    def ask() -> JobFate:
        assert fate is not None, "Slurm must not be asked here"
        return JobFate(fate=fate, words="")

    seen = Seen(kind=kind, code=code, outcome=outcome, signals=signals, killed=killed)
    return decide(seen, ask, lambda: ("FAILED", "the cause"))


def test_finished() -> None:
    assert end(outcome=FINISHED) == Ending(state="COMPLETED", exit_code=0)


def test_a_signal_at_the_very_end_does_not_undo_it() -> None:
    assert end(outcome=FINISHED, signals=("TERM",)).state == "COMPLETED"


def test_failed() -> None:
    assert end(code=1) == Ending(state="FAILED", reason="the cause", exit_code=1)


def test_memory_that_ran_out_has_its_own_word() -> None:
    seen = Seen(kind="slurm", code=1, outcome=None)
    found = decide(seen, lambda: JobFate(fate="running", words=""), lambda: ("OUT_OF_MEMORY", "at 5 GiB"))
    assert found == Ending(state="OUT_OF_MEMORY", reason="at 5 GiB", exit_code=1)


def test_finished_but_a_rank_failed_afterwards() -> None:
    assert end(code=1, outcome=FINISHED).state == "FAILED"


@pytest.mark.parametrize("kind", ["local", "slurm"])
def test_cancelled_by_the_user(kind: str) -> None:
    assert end(kind, outcome=stopped("cancel")) == Ending(
        state="CANCELLED", reason="cancel; checkpoint saved at step 9", exit_code=130
    )


@pytest.mark.parametrize(
    ("signals", "fate", "state", "requeue", "requeued"),
    [
        (("USR2",), "running", "TIMEOUT", True, False),
        (("TERM",), "running", "PREEMPTED", True, False),
        (("USR2", "TERM"), "requeued", "PENDING", False, True),
        (("TERM",), "requeued", "PENDING", False, True),
        (("TERM",), "cancelled", "CANCELLED", False, False),
        (("TERM",), "timeout", "TIMEOUT", True, False),
        (("USR2",), "unknown", "TIMEOUT", True, False),
        (("TERM",), "preempted", "PREEMPTED", True, False),
        (("USR2", "TERM"), "preempted", "PREEMPTED", True, False),
    ],
)
def test_stopped_under_slurm(
    signals: tuple[str, ...], fate: Fate, state: str, requeue: bool, requeued: bool
) -> None:
    found = end(outcome=stopped(f"signal {signals[0]}"), signals=signals, fate=fate)
    assert (found.state, found.requeue, found.requeued) == (state, requeue, requeued)
    assert "checkpoint saved at step 9" in found.reason
    assert found.exit_code != 0


def test_the_signal_came_through_the_stop_file() -> None:
    found = end(outcome=stopped("SIGUSR2"), signals=("USR2",), fate="running")
    assert found.requeue
    assert end("local", outcome=stopped("SIGTERM")).reason == "stopped by SIGTERM; checkpoint saved at step 9"


def test_only_the_workers_got_the_signal() -> None:
    found = end(outcome=stopped("signal USR2"), fate="running")
    assert found.requeue
    assert found.reason.startswith("stopped by SIGUSR2")


def test_interrupts_are_never_requeued() -> None:
    assert end(outcome=stopped("signal INT"), signals=("INT",)).state == "CANCELLED"
    assert end("local", outcome=stopped("signal USR2"), signals=("TERM",)).exit_code == 130


def test_killed_by_a_second_interrupt() -> None:
    assert end("local", code=-9, signals=("INT", "INT"), killed=True).exit_code == 130


def test_a_late_signal_to_a_leaving_worker_does_not_undo_the_stop() -> None:
    assert end("local", code=1, outcome=stopped("signal USR2"), signals=("TERM", "TERM")).state == "CANCELLED"


@pytest.mark.parametrize(
    ("fate", "state"),
    [
        ("requeued", "PENDING"),
        ("timeout", "TIMEOUT"),
        ("preempted", "PREEMPTED"),
        ("cancelled", "CANCELLED"),
        ("running", "FAILED"),
    ],
)
def test_ended_by_slurm_before_a_checkpoint(fate: Fate, state: str) -> None:
    assert end(code=1, signals=("TERM",), fate=fate).state == state


def test_outcome_of_this_try_only(tmp_path: Path) -> None:
    file = tmp_path / "outcome.json"
    assert read_outcome(file, "0.0") is None
    file.write_text('{"try": "0.0", "sta')
    assert read_outcome(file, "0.0") is None
    file.write_text(json.dumps({"try": "0.0", "status": "finished", "reason": "", "step": 9}))
    assert read_outcome(file, "0.0") == FINISHED
    assert read_outcome(file, "0.1") is None
