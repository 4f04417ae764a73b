from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from hpcdl.runs import follow as following
from hpcdl.runs.feed import Feed
from hpcdl.runs.files import write_json
from hpcdl.runs.follow import exit_code, follow, follow_all
from hpcdl.runs import hurry as hurrying
from hpcdl.runs.hurry import hurry
from hpcdl.runs.reconcile import read, reconcile
from hpcdl.runs.store import RunDir, now
from tests.runs.making import FakeJob, FakeSlurm, add_steps, ago, make_run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "TICK_S", 0.01)
    monkeypatch.setattr(following, "LOCAL_EVERY_S", 0.02)
    monkeypatch.setattr(following, "SLURM_FIRST_S", 0.02)


def console(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, highlight=False)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def later(reached: Callable[[], object], act: Callable[[], object]) -> threading.Thread:
    """Acts, in another thread, as soon as something holds."""

    def work() -> None:
        deadline = time.monotonic() + 30
        while not reached() and time.monotonic() < deadline:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def start_agent(run: RunDir, steps: int, step_s: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.runs.fake_agent", str(run.path), str(steps), str(step_s)]
    return subprocess.Popen(command, start_new_session=True)


def test_plain_lines_of_a_local_run(runs_dir: Path) -> None:
    run = make_run(runs_dir, kind="local", submission=None, created=now(), max_steps=30)
    write_json(
        run.result_file,
        {
            "eval_loss_before": 3.0,
            "eval_loss_after": 2.0,
            "eval_perplexity_before": 20.0,
            "eval_perplexity_after": 8.0,
        },
    )
    agent = start_agent(run, 30, 0.01)
    out = console()
    state = follow(run, console=out)
    assert agent.wait(timeout=30) == 0
    assert (state.state, exit_code(state)) == ("COMPLETED", 0)
    lines = text(out).splitlines()
    assert "started on here (try 0.0)" in lines
    assert "held-out perplexity 25.790 at step 0" in lines
    assert "checkpoint at step 20" in lines
    assert any(line.startswith("step 30/30  loss 3.0000  1,234 tokens/s  1.0 GiB") for line in lines)
    assert sum(line.startswith("step ") for line in lines) <= 6, "some steps, not all"
    assert any(line.startswith("COMPLETED after 0:0") for line in lines)
    assert "-33.3 %" in text(out), "the result, in the end"


def test_the_terminals_view(runs_dir: Path) -> None:
    run = make_run(runs_dir, kind="local", submission=None, created=now(), max_steps=30)
    agent = start_agent(run, 30, 0.02)
    out = console(terminal=True)
    assert follow(run, console=out).state == "COMPLETED"
    agent.wait(timeout=30)
    for words in ("loss 3.", "1,234 tokens/s", "left", "held-out perplexity 25.790", "step 30/30"):
        assert words in text(out)


def test_the_first_interrupt_saves_and_stops(runs_dir: Path) -> None:
    run = make_run(runs_dir, kind="local", submission=None, created=now())
    agent = start_agent(run, 100_000, 0.02)
    later(lambda: run.step() > 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    out = console()
    state = follow(run, console=out)
    assert (state.state, exit_code(state)) == ("CANCELLED", 130)
    assert "Ctrl-C again kills the run at once" in text(out)
    assert agent.wait(timeout=30) == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "the handler is put back"


def test_the_launchers_own_end_stops_the_run_gently(runs_dir: Path) -> None:
    run = make_run(runs_dir, kind="local", submission=None, created=now())
    agent = start_agent(run, 100_000, 0.02)
    later(lambda: run.step() > 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert follow(run, console=console()).state == "CANCELLED"
    assert agent.wait(timeout=30) == 0


def test_the_third_interrupt_kills_an_agent_that_does_not_listen(runs_dir: Path) -> None:
    run = make_run(runs_dir, kind="local", submission=None, created=now())
    agent = start_agent(run, 2, 1000)  # sleeps through every signal

    def interrupt() -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    later(lambda: run.read_state().state == "RUNNING", interrupt)
    state = follow(run, console=console())
    assert (state.state, exit_code(state)) == ("CANCELLED", 130)
    assert "killed by its user" in state.reason
    assert agent.wait(timeout=30) == -signal.SIGKILL


def test_an_interrupt_leaves_a_slurm_job_alone(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, job_id="4_0")
    fake.jobs["4"] = [FakeJob("PENDING", "0", "Priority")]
    out = console()
    later(lambda: "Priority" in text(out), lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        follow(run, console=out, slurm=fake.slurm())
    assert "hpcdl cancel aaaa11112222 ends it" in text(out)
    assert "scancel" not in fake.names()


def test_a_failure_is_told_with_its_traceback(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, state="FAILED", job_id="4_0", reason="ValueError: x (rank 0, node c1)")
    run.event("failed", reason="ValueError: x", traceback="Traceback: the whole [story]")
    out = console()
    assert exit_code(follow(run, console=out, slurm=fake.slurm())) == 1
    assert "FAILED: ValueError: x (rank 0, node c1)" in text(out)
    assert "Traceback: the whole [story]" in text(out)


def test_a_requeued_job_is_asked_to_start_now(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, job_id="4_0", requeues=1)
    run.event("requeued", reason="signal USR2", requeues=1)
    job = FakeJob("COMPLETING", "0", start="2099-01-01T10:00:00")
    fake.jobs["4"] = [job]
    update = ["scontrol", "update", "jobid=4_0", "StartTime=now"]

    def pending() -> None:
        assert update not in fake.calls, "no use while it is completing"
        job.state, job.reason = "PENDING", "BeginTime"
        later(lambda: update in fake.calls, lambda: run.update(state="COMPLETED"))

    later(lambda: fake.names().count("squeue") > 3, pending)
    assert follow(run, console=console(), slurm=fake.slurm()).state == "COMPLETED"
    assert "hastened" in [e["event"] for e in run.events()]


def test_a_look_asks_for_the_start_as_well(
    runs_dir: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(runs_dir, job_id="4_0", requeues=1)
    fake.jobs["4"] = [FakeJob("PENDING", "0", "BeginTime", start="2099-01-01T10:00:00")]
    update = ["scontrol", "update", "jobid=4_0", "StartTime=now"]

    def look() -> str:
        return hurry(reconcile(read([run]).views, fake.slurm()), fake.slurm())[0].state.reason

    run.event("requeued", reason="in an earlier launch", requeues=1)
    run.event("submitted", attempt=1)
    assert look().startswith("BeginTime: ") and update not in fake.calls, "the user's own begin time"
    run.event("requeued", reason="signal USR2", requeues=1)
    assert look().startswith("BeginTime: ") and update not in fake.calls, "its node would refuse it yet"
    monkeypatch.setattr(hurrying, "SETTLED_S", 0.0)
    assert look().startswith("requeued; asked to start now, ") and update in fake.calls
    assert run.events()[-1]["event"] == "hastened"


def test_a_begin_time_that_the_user_asked_for_is_kept(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, job_id="4_0")
    fake.jobs["4"] = [FakeJob("PENDING", "0", "BeginTime", start="2099-01-01T10:00:00")]
    later(lambda: fake.names().count("squeue") > 3, lambda: run.update(state="COMPLETED"))
    follow(run, console=console(), slurm=fake.slurm())
    assert set(fake.names()) == {"squeue"}


def test_polls_grow_rarer_while_nothing_changes(
    runs_dir: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(following.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(following, "SLURM_FIRST_S", 3.0)
    run = make_run(runs_dir, job_id="4_0")
    fake.jobs["4"] = [FakeJob("PENDING", "0", "Priority")]
    watcher = following.Watcher([run], fake.slurm())
    polls = []
    for _ in range(1200):
        watcher.look()
        polls.append(len(fake.calls))
        clock[0] += 0.5
    assert polls[20] >= 3
    assert polls[-1] - polls[-1 - 60] <= 2, "at most every 30 s in the end"


def test_follow_all(runs_dir: Path, fake: FakeSlurm) -> None:
    runs = [make_run(runs_dir, f"{i:04}", job_id=f"4_{i}", array_index=i) for i in range(2)]
    fake.jobs["4"] = [FakeJob("PENDING", "0-1", "Priority")]

    def end() -> None:
        runs[0].update(state="COMPLETED")
        runs[1].update(state="FAILED", reason="bad")

    later(lambda: fake.calls, end)
    out = console()
    states = follow_all(runs, console=out, slurm=fake.slurm())
    assert [exit_code(state) for state in states] == [0, 1]
    assert "0000 COMPLETED" in text(out)
    assert "0001 FAILED: bad" in text(out)


def test_a_slurm_that_is_away_is_asked_ever_less_and_it_is_said(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, job_id="4_0")
    fake.jobs["4"] = [FakeJob("PENDING", "0", "Priority")]
    watcher = following.Watcher([run], fake.slurm())
    remarks = []
    for number in range(9):
        fake.away = 0 < number < 8
        watcher._asked = float("-inf")
        watcher.look()
        remarks.append(watcher.take_remark())
    waits = [remark.rpartition("next try in ")[2] for remark in remarks[1:8]]
    assert waits == ["1 s", "2 s", "4 s", "8 s", "16 s", "30 s", "30 s"]
    assert (remarks[0], remarks[8], watcher.take_remark()) == ("", "Slurm answers again", "")
    assert watcher.views[0].state.state == "PENDING"


def test_the_feed_starts_again_when_the_metrics_are_rewritten(runs_dir: Path) -> None:
    run = make_run(runs_dir, created=ago(1))
    feed = Feed(run)
    add_steps(run, range(1, 11))
    feed.read()
    assert feed.progress.step == 10
    temporary = run.path / "new"
    temporary.write_text("".join(run.metrics_file.read_text().splitlines(keepends=True)[:4]))
    temporary.replace(run.metrics_file)
    feed.read()
    assert feed.progress.step == 4
    assert feed.progress.left_s(100) == pytest.approx(0.5 * 96)
