from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hpcdl.runs import contact, judge, patience, reconcile, wish
from hpcdl.runs.files import write_json
from hpcdl.runs.processes import create_time
from hpcdl.runs.reconcile import View, look
from hpcdl.runs.store import SUBMISSIONS, RunDir, now
from tests.runs.making import FakeJob, FakeSlurm, ago, make_run, make_submission


def running(runs_dir: Path, **fields: Any) -> RunDir:
    values = {"state": "RUNNING", "job_id": "4_0", "started": ago(60), **fields}
    run = make_run(runs_dir, **values)
    (run.logs / "c1-try0.0.log").write_text("x\n")
    run.event("started", **{"try": "0.0"})
    return run


def add_error(run: RunDir, rank: int, time: str, message: str) -> None:
    record = {
        "time": time,
        "node": f"c{rank}",
        "rank": rank,
        "step": 3,
        "type": "ValueError",
        "message": message,
    }
    run.errors.mkdir(exist_ok=True)
    write_json(
        run.errors / f"try0.0-restart0-rank{rank}.json", {**record, "traceback": f"Traceback {message}"}
    )


# Ended by Slurm's account while state.json says RUNNING.


@pytest.mark.parametrize(
    ("job", "state", "reason", "exit_code"),
    [
        (FakeJob("FAILED", "0", code="3:0"), "FAILED", "exit code 3", 3),
        (FakeJob("FAILED", "0", code="0:9"), "FAILED", "signal 9", 137),
        (FakeJob("TIMEOUT", "0", code="0:0"), "TIMEOUT", "time limit", 1),
        (FakeJob("OUT_OF_MEMORY", "0", code="0:125"), "OUT_OF_MEMORY", "mem_gb", 253),
        (FakeJob("NODE_FAIL", "0", nodes="c[1-2]"), "NODE_FAIL", "c1, c2", 1),
        (FakeJob("PREEMPTED", "0", code="0:15"), "PREEMPTED", "pre-empted", 143),
        (FakeJob("BOOT_FAIL", "0"), "FAILED", "BOOT_FAIL", 1),
        (FakeJob("CANCELLED", "0", code="0:15", nodes="c1"), "CANCELLED", "scancel", 143),
        (FakeJob("COMPLETED", "0"), "FAILED", "left no outcome", 1),
    ],
)
def test_ended_by_slurm(
    runs_dir: Path, fake: FakeSlurm, job: FakeJob, state: str, reason: str, exit_code: int
) -> None:
    run = running(runs_dir)
    fake.jobs["4"] = [job]
    view = look(run, fake.slurm())
    assert (view.state.state, view.state.exit_code) == (state, exit_code)
    assert reason in view.state.reason
    assert run.read_state() == view.state
    assert view.state.ended is not None
    assert run.events()[-1]["event"] == ("cancelled" if state == "CANCELLED" else "failed")


def test_the_earliest_error_is_the_root_cause(runs_dir: Path, fake: FakeSlurm) -> None:
    run = running(runs_dir)
    late, early = "2099-01-01T00:00:02.000+00:00", "2099-01-01T00:00:01.000+00:00"
    add_error(run, 0, late, "connection closed")
    add_error(run, 1, early, "bad batch\nmore")
    add_error(run, 2, ago(3600), "of an earlier try")
    fake.jobs["4"] = [FakeJob("FAILED", "0", code="1:0")]
    view = look(run, fake.slurm())
    assert view.state.reason == "ValueError: bad batch (rank 1, node c1)"
    assert run.events()[-1]["traceback"] == "Traceback bad batch\nmore"


@pytest.mark.parametrize(
    "record",
    [
        {"type": "OutOfMemoryError", "message": "CUDA out of memory"},
        {
            "type": "RuntimeError",
            "message": "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
        },
        {"type": "SIGKILL", "message": "killed by the kernel", "out_of_memory": True},
    ],
)
def test_memory_that_ran_out_is_told_though_the_agent_could_not(
    runs_dir: Path, fake: FakeSlurm, record: dict[str, Any]
) -> None:
    run = running(runs_dir)
    run.errors.mkdir(exist_ok=True)
    time = "2099-01-01T00:00:01.000+00:00"
    write_json(run.errors / "try0.0-restart0-rank1.json", {"time": time, "node": "c2", "rank": 1, **record})
    fake.jobs["4"] = [FakeJob("FAILED", "0", code="1:0")]
    state = look(run, fake.slurm()).state
    assert (state.state, state.exit_code) == ("OUT_OF_MEMORY", 1)
    assert state.reason.startswith(record["type"])
    assert run.events()[-1]["event"] == "failed"


def test_the_outcome_goes_before_a_guess(runs_dir: Path, fake: FakeSlurm) -> None:
    run = running(runs_dir)
    write_json(run.outcome_file, {"try": "0.0", "status": "finished", "step": 100, "time": now()})
    fake.jobs["4"] = [FakeJob("COMPLETED", "0")]
    view = look(run, fake.slurm())
    assert (view.state.state, view.state.exit_code) == ("COMPLETED", 0)
    assert run.events()[-1]["event"] == "finished"


def test_an_earlier_trys_outcome_is_not_believed(runs_dir: Path, fake: FakeSlurm) -> None:
    run = running(runs_dir)
    write_json(run.outcome_file, {"try": "0.0", "status": "finished", "step": 100, "time": ago(3600)})
    fake.jobs["4"] = [FakeJob("COMPLETED", "0")]
    assert look(run, fake.slurm()).state.state == "FAILED"


def test_forgotten_while_running(runs_dir: Path, fake: FakeSlurm) -> None:
    run = running(runs_dir)
    view = look(run, fake.slurm())
    assert view.state.state == "FAILED"
    assert "knows no job 4_0 any more" in view.state.reason


def test_a_task_cancelled_before_it_was_split_off_its_array_leaves_no_record(
    runs_dir: Path, fake: FakeSlurm
) -> None:
    run = make_run(runs_dir, array_index=1)
    make_submission(runs_dir, job_id="4")
    fake.jobs["4"] = [FakeJob("PENDING", "0,2")]
    view = look(run, fake.slurm())
    assert (view.state.state, run.read_state().state) == ("CANCELLED", "CANCELLED")
    assert view.state.reason == "cancelled while pending; it will never write a log"


def test_forgotten_after_its_setup_has_failed(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir)
    (make_submission(runs_dir, job_id="4") / "slurm-4_0.out").write_text("no such module\n")
    view = look(run, fake.slurm())
    assert view.state.state == "FAILED"
    assert "before its agent had started: no such module" in view.state.reason


def test_a_setup_line_that_fails_is_told_from_slurms_own_output(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir)
    folder = make_submission(runs_dir, job_id="4")
    (folder / "slurm-4_0.out").write_text("loading\nmodule: no module named cuda\n")
    (folder / "slurm-4_10.out").write_text("another's\n")
    fake.jobs["4"] = [FakeJob("FAILED", "0", code="1:0", nodes="c1")]
    reason = look(run, fake.slurm()).state.reason
    assert reason == (
        "the job ended with exit code 1 before the agent had started: module: no module named cuda"
    )


# What only changes the view, or isn't known.


def test_cancelled_while_pending(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, job_id="4_7", array_index=7)
    fake.jobs["4"] = [FakeJob("CANCELLED", "3-30%2", "JobArrayTaskLimit")]
    view = look(run, fake.slurm())
    assert (view.state.state, view.state.reason) == (
        "CANCELLED",
        "cancelled while pending; it will never write a log",
    )


def test_the_queues_reason_is_shown_and_not_written(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, job_id="4_0")
    before = run.state_file.read_bytes()
    fake.jobs["4"] = [FakeJob("PENDING", "0-9", "Priority", start="2099-01-01T10:00:00")]
    view = look(run, fake.slurm())
    assert view.state.reason.startswith("Priority: other jobs come first; expected to start 2099-01-01")
    assert run.state_file.read_bytes() == before


def test_a_requeued_job_waits_for_its_begin_time(runs_dir: Path, fake: FakeSlurm) -> None:
    run = running(runs_dir, state="PENDING", requeues=1)
    fake.jobs["4"] = [FakeJob("PENDING", "0", "BeginTime", start="2099-01-01T10:00:00")]
    view = look(run, fake.slurm())
    assert "Slurm starts a requeued job about two minutes later; expected to start" in view.state.reason


def test_requeued_by_slurm_itself(runs_dir: Path, fake: FakeSlurm) -> None:
    run = running(runs_dir)
    fake.jobs["4"] = [FakeJob("PENDING", "0", "BeginTime", start="2099-01-01T10:00:00")]
    assert look(run, fake.slurm()).state.state == "PENDING"
    assert run.read_state().state == "PENDING"
    assert [e["event"] for e in run.events()] == ["started", "requeued"]
    assert "BeginTime" in look(run, fake.slurm()).state.reason
    assert len(run.events()) == 2, "told once"


def test_running_by_slurm_before_the_agent_says_so(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, job_id="4_0")
    fake.jobs["4"] = [FakeJob("RUNNING", "0", start="2026-01-01T10:00:00", nodes="c1")]
    look(run, fake.slurm())
    assert run.read_state().state == "RUNNING"
    assert run.read_state().node_list == ("c1",)


def test_the_old_try_going_down_is_not_the_next_one(runs_dir: Path, fake: FakeSlurm) -> None:
    run = running(runs_dir, state="PENDING", requeues=1)
    run.event("requeued", reason="x", requeues=1)
    fake.jobs["4"] = [FakeJob("RUNNING", "0", start="2026-01-01T10:00:00", nodes="c1")]
    assert look(run, fake.slurm()).state.state == "PENDING"
    fake.jobs["4"] = [FakeJob("COMPLETING", "0", start="2026-01-01T10:00:00", nodes="c1")]
    assert look(run, fake.slurm()).state.state == "PENDING"


def test_a_failed_poll_is_not_a_state(runs_dir: Path, fake: FakeSlurm) -> None:
    run = running(runs_dir)
    before = run.state_file.read_bytes()
    fake.away = True
    view = look(run, fake.slurm())
    assert view.state.state == "UNKNOWN"
    assert "(RUNNING when last known" in view.state.reason and "Slurm does not answer: " in view.state.reason
    assert run.state_file.read_bytes() == before
    fake.away = False
    fake.jobs["4"] = [FakeJob("RUNNING", "0")]
    assert look(run, fake.slurm()).state.state == "RUNNING"


def test_since_when_a_state_is_unknown(runs_dir: Path, fake: FakeSlurm) -> None:
    run = running(runs_dir)
    other = make_run(runs_dir, "cccc", job_id="4_1", array_index=1)
    fake.jobs["4"] = [FakeJob("RUNNING", "0"), FakeJob("PENDING", "1", "Priority")]
    look(run, fake.slurm())
    answered = contact.last_answer(runs_dir)
    assert answered is not None
    fake.away = True
    time.sleep(0.01)
    run.event("checkpoint", step=3)
    views = reconcile.reconcile(reconcile.read([run, other]).views, fake.slurm())
    assert [view.since for view in views] == [answered, answered]
    assert all(view.state.reason.startswith(f"unknown since {judge.clock(answered)} (") for view in views)
    assert "RUNNING when last known, last sign of life" in views[0].state.reason
    assert "PENDING when last known)" in views[1].state.reason
    fake.away = False
    assert look(run, fake.slurm()).since is None


def test_a_look_asks_again_and_says_so(runs_dir: Path, fake: FakeSlurm) -> None:
    run = running(runs_dir)
    fake.jobs["4"] = [FakeJob("RUNNING", "0")]
    fake.away = True
    said: list[str] = []

    def sleep(_: float) -> None:
        fake.away = len(said) < 2

    waits = patience.Patience(60.0, say=said.append, sleep=sleep)
    (view,) = reconcile.reconcile(reconcile.read([run]).views, fake.slurm(), waits)
    assert view.state.state == "RUNNING" and [line[-3:] for line in said] == ["1 s", "2 s"]


def test_a_job_that_ends_while_slurm_is_away_says_so_itself(runs_dir: Path, fake: FakeSlurm) -> None:
    run = running(runs_dir)
    fake.away = True
    assert look(run, fake.slurm()).state.state == "UNKNOWN"
    run.update(state="COMPLETED", exit_code=0)
    calls = len(fake.calls)
    assert look(run, fake.slurm()).state.state == "COMPLETED" and len(fake.calls) == calls


def test_a_cancel_that_was_wished_meanwhile_is_told_now(runs_dir: Path, fake: FakeSlurm) -> None:
    waiting = make_run(runs_dir, job_id="4_0")
    training = running(runs_dir, run_id="bbbb", job_id="4_1", array_index=1)
    at_once = running(runs_dir, run_id="cccc", job_id="4_2", array_index=2)
    fake.jobs["4"] = [FakeJob("PENDING", "0"), FakeJob("RUNNING", "1"), FakeJob("RUNNING", "2")]
    for run in (waiting, training):
        wish.make(run, now=False)
    wish.make(at_once, now=True)
    runs = [waiting, training, at_once]
    reconcile.reconcile(reconcile.read(runs).views, fake.slurm())
    assert ["scancel", "4_0", "4_2"] in fake.calls, "the other's workers save and stop by themselves"
    views = reconcile.reconcile(reconcile.read(runs).views, fake.slurm())
    assert [view.state.state for view in views] == ["CANCELLED", "RUNNING", "CANCELLED"]


def test_another_clusters_job_of_the_same_number_is_not_ours(runs_dir: Path, fake: FakeSlurm) -> None:
    run = running(runs_dir)
    fake.jobs["4"] = [FakeJob("RUNNING", "0", comment="hpcdl:other")]
    assert look(run, fake.slurm()).state.state == "FAILED"


def test_finished_runs_are_not_asked_for(runs_dir: Path, fake: FakeSlurm) -> None:
    runs = [running(runs_dir, run_id=f"{i:04}", state="COMPLETED") for i in range(5)]
    reconcile.reconcile(reconcile.read(runs).views, fake.slurm())
    assert fake.calls == []


# Submissions whose launcher got no answer.


def test_a_lost_answer_of_sbatch_is_found_by_the_comment(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, array_index=2)
    folder = make_submission(runs_dir)
    fake.jobs["8"] = [FakeJob("PENDING", "0-3", "Priority")]
    view = look(run, fake.slurm())
    assert (view.state.job_id, view.state.state) == ("8_2", "PENDING")
    assert "Priority" in view.state.reason, "asked for in the same poll"
    assert json.loads((folder / "submission.json").read_text())["job_id"] == "8"


def test_never_submitted(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir)
    make_submission(runs_dir)
    view = look(run, fake.slurm())
    assert (view.state.state, run.read_state().state) == ("FAILED", "FAILED")
    assert "launch it again" in view.state.reason


def test_found_by_its_output_after_slurm_has_forgotten_it(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, array_index=3)
    (make_submission(runs_dir) / "slurm-8_3.out").write_text("module: command not found\n")
    view = look(run, fake.slurm())
    assert (view.state.state, view.state.job_id) == ("FAILED", "8_3")
    assert "module: command not found" in view.state.reason


def test_of_two_jobs_of_one_submission_the_second_is_cancelled(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir)
    make_submission(runs_dir)
    fake.jobs["9"] = [FakeJob("PENDING", "0")]
    fake.jobs["8"] = [FakeJob("PENDING", "0")]
    assert look(run, fake.slurm()).state.job_id == "8_0"
    assert ["scancel", "9"] in fake.calls


def test_a_launcher_elsewhere_is_waited_for_and_not_for_ever(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, created=ago(600))
    make_submission(runs_dir, host="elsewhere", pid=1, created=ago(600))
    assert look(run, fake.slurm()).state.reason == "is being submitted"
    make_submission(runs_dir, host="elsewhere", pid=1, created=ago(2000))
    assert look(run, fake.slurm()).state.state == "FAILED"


def test_a_living_launcher_is_still_submitting(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir)
    launcher = {"host": os.uname().nodename, "pid": os.getpid(), "pid_started": create_time(os.getpid())}
    make_submission(runs_dir, **launcher)
    view = look(run, fake.slurm())
    assert (view.state.state, view.state.reason) == ("PENDING", "is being submitted")


def test_a_fresh_submission_gets_time(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, created=ago(1))
    make_submission(runs_dir, created=ago(1))
    assert look(run, fake.slurm()).state.state == "PENDING"


def test_never_submitted_is_not_judged_while_slurm_is_away(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir)
    make_submission(runs_dir)
    fake.away = True
    assert look(run, fake.slurm()).state.state == "UNKNOWN"
    assert run.read_state().state == "PENDING"


# Races.


def test_a_poller_with_old_knowledge_overwrites_nothing(runs_dir: Path, fake: FakeSlurm) -> None:
    run = running(runs_dir)
    old = View(run=run, state=run.read_state())
    fake.jobs["4"] = [FakeJob("FAILED", "0", code="1:0")]
    run.update(state="COMPLETED", exit_code=0)  # the agent speaks while Slurm is asked
    (view,) = reconcile.reconcile([old], fake.slurm())
    assert view.state.state == run.read_state().state == "COMPLETED"
    assert [e["event"] for e in run.events()] == ["started"]


def test_many_pollers_write_one_event(runs_dir: Path, fake: FakeSlurm) -> None:
    run = running(runs_dir)
    fake.jobs["4"] = [FakeJob("TIMEOUT", "0")]
    old = View(run=run, state=run.read_state())
    for _ in range(8):
        reconcile.reconcile([old], fake.slurm())
    with ThreadPoolExecutor(8) as pool:
        views = list(pool.map(lambda _: look(run, fake.slurm()), range(8)))
    assert {view.state.state for view in views} == {"TIMEOUT"}
    assert [e["event"] for e in run.events()] == ["started", "failed"]


# Local runs.


@pytest.fixture
def agent(runs_dir: Path) -> Iterator[tuple[RunDir, subprocess.Popen[bytes]]]:
    run = make_run(runs_dir, kind="local", submission=None, created=now())
    command = [sys.executable, "-m", "tests.runs.fake_agent", str(run.path), "100000", "0.05"]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 30
    while run.step() == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert run.step() > 0
    yield run, process
    process.kill()
    process.wait()


def test_kill_9_of_an_agent_is_found_by_the_next_poll(agent: tuple[RunDir, subprocess.Popen[bytes]]) -> None:
    run, process = agent
    assert look(run).state.state == "RUNNING"
    process.send_signal(signal.SIGKILL)
    # Not waited for: a zombie of ours is gone as well.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    view = look(run)
    assert view.state.state == run.read_state().state == "FAILED"
    assert "kill -9" in view.state.reason
    assert run.events()[-1]["event"] == "failed"


def test_a_reused_pid_is_told_apart(runs_dir: Path) -> None:
    run = make_run(
        runs_dir,
        kind="local",
        state="RUNNING",
        host=os.uname().nodename,
        agent_pid=os.getpid(),
        agent_started=create_time(os.getpid()) - 100,
    )
    assert look(run).state.state == "FAILED"


def test_a_run_on_another_machine_is_not_judged_from_here(runs_dir: Path) -> None:
    run = make_run(runs_dir, kind="local", state="RUNNING", host="elsewhere", agent_pid=1)
    view = look(run)
    assert (view.state.state, run.read_state().state) == ("RUNNING", "RUNNING")
    assert "elsewhere" in view.unchecked


def test_a_local_run_waits_for_its_turn_while_its_shell_lives(runs_dir: Path) -> None:
    run = make_run(runs_dir, kind="local", agent_pid=1, host="of an earlier try")
    folder = make_submission(runs_dir, kind="local")
    record = {"pid": os.getpid(), "started": create_time(os.getpid()), "host": os.uname().nodename}
    write_json(folder / "runner.json", record)
    assert look(run).state.state == "PENDING"
    write_json(folder / "runner.json", {**record, "started": 1.0})
    (runs_dir / SUBMISSIONS / "tok1" / "local.out").write_text("module: command not found\n")
    view = look(run)
    assert view.state.state == "FAILED"
    assert "module: command not found" in view.state.reason
