from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from hpcdl.errors import UsageError
from hpcdl.runs import logs
from hpcdl.runs.logs import Wanted
from hpcdl.runs.store import RunDir
from tests.runs.making import FakeJob, FakeSlurm, ago, make_run, make_submission


def stamp(second: int) -> str:
    return f"2026-01-01T00:00:{second:02}.000+00:00"


class Output:
    """What was written, and what was said beside it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.remarks: list[str] = []

    def show(self, run: RunDir, wanted: Wanted | None = None) -> Output:
        logs.show(run, wanted or Wanted(), self.lines.append, self.remarks.append)
        return self

    def texts(self) -> list[str]:
        return [line.rsplit(" ", 1)[-1] for line in self.lines]


@pytest.fixture
def run(runs_dir: Path) -> RunDir:
    run = make_run(runs_dir, state="COMPLETED")
    (run.logs / "c1-try0.0.log").write_text(
        f"{stamp(1)} [rank 0] a\n{stamp(5)} [rank 0] e\ncontinued\n{stamp(9)} [agent] z\n"
    )
    (run.logs / "c2-try0.0.log").write_text(f"{stamp(2)} [rank 1] b\n{stamp(6)} [rank 1] f\n")
    (run.logs / "c1-try0.1.log").write_text(f"{stamp(20)} [rank 0] later\n")
    return run


def test_nodes_are_merged_by_time_and_tries_kept_apart(run: RunDir) -> None:
    output = Output().show(run)
    assert output.texts() == ["a", "b", "e", "continued", "f", "z", "later"]
    assert output.remarks == ["try 0.0", "try 0.1"]


@pytest.mark.parametrize(
    ("wanted", "texts"),
    [
        (Wanted(node="c2"), ["b", "f"]),
        (Wanted(rank=0), ["a", "e", "later"]),
        (Wanted(attempt="0.1"), ["later"]),
        (Wanted(attempt="0", rank=1), ["b", "f"]),
    ],
)
def test_selection(run: RunDir, wanted: Wanted, texts: list[str]) -> None:
    assert Output().show(run, wanted).texts() == texts


def test_a_node_that_has_no_log(run: RunDir) -> None:
    with pytest.raises(UsageError, match=r"there are: c1-try0\.0\.log, c2-try0\.0\.log"):
        Output().show(run, Wanted(node="c9"))


def test_a_clock_that_goes_back_keeps_a_nodes_order() -> None:
    lines = [f"{stamp(5)} [rank 0] a", f"{stamp(3)} [rank 0] b"]
    assert list(logs.merge([lines, [f"{stamp(4)} [rank 1] x"]])) == [f"{stamp(4)} [rank 1] x", *lines]


def test_cancelled_while_pending_says_that_there_will_be_none(runs_dir: Path) -> None:
    run = make_run(runs_dir, state="CANCELLED", reason="cancelled while pending; it will never write a log")
    assert "never write a log" in Output().show(run).remarks[0]


def test_the_jobs_own_output_where_the_agent_never_started(runs_dir: Path) -> None:
    run = make_run(runs_dir, state="FAILED", job_id="4_0")
    (make_submission(runs_dir, job_id="4") / "slurm-4_0.out").write_text("module: not found\n")
    output = Output().show(run)
    assert output.lines == ["module: not found"]
    assert "the agent wrote no log" in output.remarks[0]


def start_following(run: RunDir, fake: FakeSlurm, output: Output) -> threading.Thread:
    def work() -> None:
        logs.follow(
            run,
            Wanted(),
            output.lines.append,
            output.remarks.append,
            slurm=fake.slurm(),
            read_every_s=0.01,
            ask_every_s=0.02,
            settle_s=0.1,
        )

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def until(reached: object) -> None:
    deadline = time.monotonic() + 20
    while not reached() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.01)
    assert reached()  # type: ignore[operator]


def test_follow_waits_goes_over_a_requeue_and_ends_with_the_run(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, job_id="4_0")
    job = FakeJob("PENDING", "0", "Priority")
    fake.jobs["4"] = [job]
    output = Output()
    thread = start_following(run, fake, output)
    until(lambda: any("Priority" in remark for remark in output.remarks))
    job.state, job.reason = "RUNNING", "None"
    run.update(state="RUNNING")
    first = (run.logs / "c1-try0.0.log").open("a")
    first.write(f"{stamp(1)} [rank 0] one\n{stamp(2)} [rank 0] ha")
    first.flush()
    until(lambda: output.texts() == ["one"])
    first.write("lf\n")
    first.close()
    until(lambda: output.texts() == ["one", "half"])
    (run.logs / "c2-try0.1.log").write_text(f"{stamp(3)} [rank 0] two\n")
    until(lambda: output.texts() == ["one", "half", "two"])
    run.update(state="COMPLETED")
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert output.remarks[-1] == "COMPLETED"


def test_lines_of_nodes_are_in_order_though_one_comes_to_light_late(runs_dir: Path) -> None:
    """A network file system shows another node's file, or its new lines, a look later."""
    run = make_run(runs_dir, state="RUNNING")
    output = Output()
    stream = logs.Stream(run, Wanted(), output.lines.append, output.remarks.append)
    here, there = run.logs / "c1-try0.0.log", run.logs / "c2-try0.0.log"
    there.write_text(f"{stamp(0)} [rank 1] z\n")
    here.write_text(f"{stamp(1)} [rank 0] a\n{stamp(3)} [rank 0] c\nthe rest of c\n")
    assert stream.read()
    there.write_text(f"{stamp(0)} [rank 1] z\n{stamp(2)} [rank 1] b\n{stamp(4)} [rank 1] d\n")
    assert stream.read()
    assert output.texts() == ["z", "a", "b", "c", "c"]
    assert not stream.read()
    assert output.texts()[5:] == ["d"]
    stream.end()
    assert len(output.lines) == 6


def test_no_line_is_lost_or_doubled(runs_dir: Path) -> None:
    """In pieces, in a file that vanishes for a while, in one that comes late, over a try that begins, half a line."""
    run = make_run(runs_dir, state="RUNNING")
    output = Output()
    stream = logs.Stream(run, Wanted(), output.lines.append, output.remarks.append)
    text = "".join(f"{stamp(n % 60)} [rank 0] {n}\n" for n in range(60)).encode()
    first, late = run.logs / "c1-try0.0.log", run.logs / "c2-try0.0.log"
    for size in range(0, len(text), 17):
        first.write_bytes(text[: size + 17])
        stream.read()
    first.rename(run.path / "away")
    stream.read()
    (run.path / "away").rename(first)
    late.write_text(f"{stamp(1)} [rank 1] late\n")
    stream.read()
    (run.logs / "c1-try0.1.log").write_text(f"{stamp(59)} [rank 0] again\n{stamp(59)} [rank 0] hal")
    stream.read()
    stream.end()
    assert output.texts() == [*map(str, range(60)), "late", "again", "hal"]
    assert output.remarks == ["try 0.1"]


def test_a_log_that_is_cut_short_begins_anew(runs_dir: Path) -> None:
    run = make_run(runs_dir, state="RUNNING")
    output = Output()
    stream = logs.Stream(run, Wanted(), output.lines.append, output.remarks.append)
    log = run.logs / "c1-try0.0.log"
    log.write_text(f"{stamp(1)} [rank 0] {'long' * 20}\n")
    stream.read()
    log.write_text(f"{stamp(2)} [rank 0] new\n")
    stream.read()
    assert output.texts()[1:] == ["new"]


def test_last_words_that_come_after_the_end_are_shown(runs_dir: Path, fake: FakeSlurm) -> None:
    """The agent writes down how the run ended, and then tells its log."""
    run = make_run(runs_dir, state="FAILED", reason="it failed", ended=ago(0))
    log = run.logs / "c1-try0.0.log"
    log.write_text(f"{stamp(1)} [rank 0] a\n")
    output = Output()
    thread = start_following(run, fake, output)
    until(lambda: output.texts() == ["a"])
    with log.open("a") as file:
        file.write(f"{stamp(2)} [agent] FAILED\n")
    thread.join(timeout=20)
    assert output.texts() == ["a", "FAILED"]
    assert output.remarks == ["FAILED: it failed"]


def test_follow_of_a_run_that_is_cancelled_while_pending_ends(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, job_id="4_0")
    job = FakeJob("PENDING", "0", "Priority")
    fake.jobs["4"] = [job]
    output = Output()
    thread = start_following(run, fake, output)
    until(lambda: output.remarks)
    job.state = "CANCELLED"
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert "never write a log" in output.remarks[-1]
