"""What is looked at, how often Slurm is asked, and what happens to runs that aren't as they should be."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpcdl.runs.private import open_to_read
from hpcdl.runs.store import RunDir
from hpcdl.top import reading
from hpcdl.top.watch import ASK_EVERY_S, Picture, Wanted, Watch
from tests.runs.making import FakeJob, FakeSlurm, ago, make_run, make_submission
from tests.top.making import array, ended, running, sample, train


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def watching(runs_dir: Path, fake: FakeSlurm, clock: Clock, *queries: str, everything: bool = False) -> Watch:
    wanted = Wanted(folder=runs_dir, queries=queries, everything=everything)
    return Watch(wanted, fake.slurm(), clock)


def states(picture: Picture) -> dict[str, str]:
    return {row.state.run_id: row.state.state for row in picture.rows}


def test_slurm_is_asked_once_for_300_runs_and_again_after_30_s(runs_dir: Path, fake: FakeSlurm, clock: Clock):
    array(fake, runs_dir, 300)
    watch = watching(runs_dir, fake, clock)
    for _ in range(40):  # two seconds each
        watch.refresh()
        watch.ask()
        clock.now += 2
    assert fake.names() == ["squeue"] * 3  # at 0, 30 and 60 s of 80
    assert all(call.count("-j") == 1 for call in fake.calls)
    assert states(watch.refresh()) == {f"{i:012x}": "RUNNING" for i in range(300)}


def test_jobs_of_many_submissions_go_into_one_call(runs_dir: Path, fake: FakeSlurm, clock: Clock):
    for i in range(50):
        fake.jobs[str(100 + i)] = [FakeJob("PENDING", tasks="0", reason="Priority", comment=f"hpcdl:t{i}")]
        make_run(runs_dir, f"{i:012x}", submission=f"t{i}", job_id=f"{100 + i}_0")
    watch = watching(runs_dir, fake, clock)
    watch.refresh()
    assert watch.ask()
    assert fake.names() == ["squeue"]
    assert fake.calls[0][fake.calls[0].index("-j") + 1].count(",") == 49
    assert {row.state.reason for row in watch.refresh().rows} == {"Priority: other jobs come first"}


def test_asking_early_is_refused(runs_dir: Path, fake: FakeSlurm, clock: Clock):
    array(fake, runs_dir, 2)
    watch = watching(runs_dir, fake, clock)
    assert not watch.ask()  # nothing is known yet
    watch.refresh()
    assert watch.ask()
    clock.now += ASK_EVERY_S - 1
    assert not watch.ask()
    assert watch.refresh().slurm.asked_ago_s == ASK_EVERY_S - 1
    clock.now += 1
    assert watch.ask()


def test_a_slurm_that_is_away_is_not_asked_more_often(runs_dir: Path, fake: FakeSlurm, clock: Clock):
    array(fake, runs_dir, 3)
    fake.away = True
    watch = watching(runs_dir, fake, clock)
    watch.refresh()
    watch.ask()
    clock.now += 10
    assert not watch.ask()
    picture = watch.refresh()
    assert set(states(picture).values()) == {"UNKNOWN"}
    assert "Unable to contact" in picture.slurm.away
    fake.away = False
    clock.now += ASK_EVERY_S
    watch.ask()
    assert set(states(watch.refresh()).values()) == {"RUNNING"}


def test_local_runs_never_ask_slurm(runs_dir: Path, fake: FakeSlurm, clock: Clock):
    running(runs_dir, kind="local", host="elsewhere", agent_pid=1, job_id=None)
    watch = watching(runs_dir, fake, clock)
    watch.refresh()
    assert not watch.ask_due()
    assert not watch.ask()
    assert fake.calls == []


def test_the_expected_start_comes_with_the_reason(runs_dir: Path, fake: FakeSlurm, clock: Clock):
    make_submission(runs_dir, job_id="7")
    fake.jobs["7"] = [FakeJob("PENDING", tasks="0", reason="Resources", start="2099-01-02T03:04:05")]
    make_run(runs_dir, job_id="7_0")
    watch = watching(runs_dir, fake, clock)
    watch.refresh()
    watch.ask()
    job = watch.refresh().rows[0].view.job
    assert job is not None
    assert (job.reason, job.start) == ("Resources", "2099-01-02T03:04:05.000+00:00")
    assert fake.names() == ["squeue"]


def test_active_ones_and_those_of_the_last_hour_are_shown(runs_dir: Path, fake: FakeSlurm, clock: Clock):
    running(runs_dir, "aaaaaaaaaaaa")
    ended(runs_dir, "bbbbbbbbbbbb", seconds=600)
    ended(runs_dir, "cccccccccccc", seconds=4000)
    picture = watching(runs_dir, fake, clock).refresh()
    assert set(states(picture)) == {"aaaaaaaaaaaa", "bbbbbbbbbbbb"}
    assert picture.hidden == 1
    assert len(watching(runs_dir, fake, clock, everything=True).refresh().rows) == 3
    assert set(states(watching(runs_dir, fake, clock, "cccccccccccc").refresh())) == {"cccccccccccc"}


def test_new_runs_appear_and_old_ones_that_begin_anew(runs_dir: Path, fake: FakeSlurm, clock: Clock):
    old = ended(runs_dir, "cccccccccccc", "FAILED", seconds=4000)
    watch = watching(runs_dir, fake, clock)
    assert watch.refresh().rows == ()
    running(runs_dir, "aaaaaaaaaaaa")
    old.update(state="PENDING", ended=None)
    clock.now += 10
    assert states(watch.refresh()) == {"aaaaaaaaaaaa": "RUNNING", "cccccccccccc": "PENDING"}


def test_a_run_that_vanishes_is_gone(runs_dir: Path, fake: FakeSlurm, clock: Clock):
    run, other = array(fake, runs_dir, 2)
    watch = watching(runs_dir, fake, clock)
    watch.refresh()
    shutil.rmtree(run.path)
    watch.ask()
    picture = watch.refresh()
    assert [row.view.run for row in picture.rows] == [other]
    assert picture.faults == ()


def test_a_run_that_vanishes_while_slurm_is_asked(runs_dir: Path, fake: FakeSlurm, clock: Clock):
    run, other = array(fake, runs_dir, 2)
    fake.jobs["7"] = [
        FakeJob("TIMEOUT", tasks="0"),
        FakeJob("RUNNING", tasks="1", start=ago(120), nodes="n1"),
    ]
    watch = watching(runs_dir, fake, clock)
    watch.refresh()
    answer = fake.run

    def gone(*arguments):
        shutil.rmtree(run.path, ignore_errors=True)
        return answer(*arguments)

    watch.slurm = type(watch.slurm)(runner=gone)
    watch.ask()
    assert [row.view.run for row in watch.refresh().rows] == [other]
    clock.now += ASK_EVERY_S
    watch.ask()
    assert watch.refresh().slurm.away == ""


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"run_id": 5}', '{"state": "RUNNING"}', "\x00\x1b[2J", "[" * 100_000]
)
def test_a_state_that_is_none_is_a_fault_and_no_crash(
    runs_dir: Path, fake: FakeSlurm, clock: Clock, text: str
):
    running(runs_dir, "aaaaaaaaaaaa")
    running(runs_dir, "bbbbbbbbbbbb").state_file.write_text(text)
    picture = watching(runs_dir, fake, clock).refresh()
    assert set(states(picture)) == {"aaaaaaaaaaaa"}
    assert len(picture.faults) == 1
    assert "bbbbbbbbbbbb" in picture.faults[0]


def test_no_runs_at_all(tmp_path: Path, fake: FakeSlurm, clock: Clock):
    assert watching(tmp_path / "nowhere", fake, clock).refresh().rows == ()


def test_a_run_of_one_second_has_no_measurements(runs_dir: Path, fake: FakeSlurm, clock: Clock):
    running(runs_dir, started=ago(1))
    row = watching(runs_dir, fake, clock).refresh().rows[0]
    assert (row.step, row.loss, row.curve, row.nodes, row.fullest, row.cpu_percent) == (
        0,
        None,
        (),
        (),
        None,
        None,
    )


@pytest.mark.parametrize(
    "line", ['{"step": 3, "loss": 2.', "\xff\xfe", '{"step": "x", "loss": []}', "[1]", "null"]
)
def test_a_torn_line_hides_nothing_else(runs_dir: Path, fake: FakeSlurm, clock: Clock, line: str):
    run = running(runs_dir)
    train(run, range(1, 3))
    sample(run)
    for file in (run.metrics_file, run.events_file, run.path / "system-n1.jsonl"):
        with file.open("a") as out:
            out.write(line + "\n")
    train(run, range(3, 5))
    sample(run, node_cpu_percent=62.0)
    row = watching(runs_dir, fake, clock).refresh().rows[0]
    assert row.step == 4
    assert row.nodes[0].sample.node_cpu_percent == 62.0


def count_opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    opened: list[Path] = []

    def counting(path: Path):
        opened.append(path)
        return open_to_read(path)

    monkeypatch.setattr("hpcdl.runs.tail.open_to_read", counting)
    monkeypatch.setattr("hpcdl.runs.private.open_to_read", counting)
    return opened


def test_only_what_has_changed_is_opened(
    runs_dir: Path, fake: FakeSlurm, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    runs = array(fake, runs_dir, 20)
    for run in runs:
        train(run, range(1, 5))
        sample(run)
        run.event("started")
    watch = watching(runs_dir, fake, clock)
    before = watch.refresh()
    opened = count_opened(monkeypatch)
    again = watch.refresh()
    assert opened == []
    assert all(new is old for new, old in zip(again.rows, before.rows, strict=True))
    train(runs[3], range(5, 6))
    after = watch.refresh()
    assert opened == [runs[3].metrics_file]
    assert [row.step for row in after.rows if row.view.run == runs[3]] == [5]


def test_the_first_look_reads_little_of_a_long_run(
    runs_dir: Path, fake: FakeSlurm, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    run = running(runs_dir, max_steps=40_000)
    train(run, range(1, 20_001))
    reader = reading.RunReader(run)
    assert run.metrics_file.stat().st_size > 8 * reading.WINDOW
    row = watching(runs_dir, fake, clock).refresh().rows[0]
    assert row.step == 20_000
    first, last = row.curve[0], row.curve[-1]
    assert first[0] < 500  # the curve is the whole run's
    assert last[0] == 20_000
    steps = [step for step, _ in row.curve]
    assert steps == sorted(steps)
    assert reader.state is None  # a reader reads nothing before it is asked


def test_a_resumed_run_loses_what_lay_behind_its_checkpoint(runs_dir: Path, fake: FakeSlurm, clock: Clock):
    run = running(runs_dir)
    train(run, range(1, 51))
    watch = watching(runs_dir, fake, clock)
    assert watch.refresh().rows[0].step == 50
    lines = run.metrics_file.read_text().splitlines()[:20]
    replaced = run.path / "new"
    replaced.write_text("".join(line + "\n" for line in lines))
    replaced.replace(run.metrics_file)
    row = watch.refresh().rows[0]
    assert row.step == 20
    assert row.curve[-1][0] == 20


def test_samples_of_an_earlier_try_are_none_of_this_one(runs_dir: Path, fake: FakeSlurm, clock: Clock):
    run = running(runs_dir, running_try="0.1")
    sample(run, "n1")
    sample(run, "n2", attempt="0.1")
    watch = watching(runs_dir, fake, clock)
    assert [node.sample.node for node in watch.refresh().rows[0].nodes] == ["n2"]
    sample(run, "n3", attempt="0.1")  # a node that begins later
    assert [node.sample.node for node in watch.refresh().rows[0].nodes] == ["n2", "n3"]


def test_memory_is_the_fullest_nodes_and_pss_stays_between_its_looks(
    runs_dir: Path, fake: FakeSlurm, clock: Clock
):
    run = running(runs_dir, nodes=2)
    sample(run, "n1")
    sample(run, "n2", memory_available_bytes=2 << 30)
    sample(run, "n2", memory_available_bytes=2 << 30, pss_bytes=None)
    fullest = watching(runs_dir, fake, clock).refresh().rows[0].fullest
    assert fullest is not None
    assert fullest.sample.node == "n2"
    assert fullest.used_bytes == 5 << 30
    assert fullest.share == pytest.approx(62 / 64)


def test_rates_are_between_two_samples(runs_dir: Path, fake: FakeSlurm, clock: Clock):
    run = running(runs_dir)
    sample(run, time="2026-01-01T00:00:00.000+00:00", net_sent_bytes=1000)
    sample(run, time="2026-01-01T00:00:05.000+00:00", net_sent_bytes=6000)
    node = watching(runs_dir, fake, clock).refresh().rows[0].nodes[0]
    assert node.rate("net_sent_bytes") == 1000.0


def test_a_refresh_of_300_active_runs_is_quick(runs_dir: Path, fake: FakeSlurm):
    runs = array(fake, runs_dir, 300)
    for run in runs:
        train(run, range(1, 60))
        sample(run)
    watch = Watch(Wanted(folder=runs_dir), fake.slurm())
    watch.refresh()
    watch.ask()
    watch.refresh()
    began = time.process_time()
    for step in range(60, 63):
        for run in runs[::3]:
            train(run, range(step, step + 1))
        watch.refresh()
    assert (time.process_time() - began) / 3 < 0.5  # about 0.03 s; two seconds pass between two looks


def test_ten_thousand_runs_that_ended_take_several_turns(
    runs_dir: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
):
    for i in range(30):
        ended(runs_dir, f"{i:012x}", seconds=90_000)
    running(runs_dir, "ffffffffffff")
    monkeypatch.setattr("hpcdl.top.watch.BUDGET_S", 0.0)
    watch = Watch(Wanted(folder=runs_dir), fake.slurm())
    pictures = [watch.refresh()]
    while pictures[-1].unread:
        pictures.append(watch.refresh())
    assert len(pictures) > 5
    assert pictures[-1].hidden == 30
    assert states(pictures[-1]) == {"ffffffffffff": "RUNNING"}


def test_anothers_folder_that_holds_no_files(runs_dir: Path, fake: FakeSlurm, clock: Clock):
    """A folder where a file should be, a pipe that nobody writes to: neither is waited for."""
    import os

    run: RunDir = running(runs_dir)
    os.mkfifo(run.metrics_file)
    run.events_file.mkdir()
    picture = watching(runs_dir, fake, clock).refresh()
    assert len(picture.rows) == 1
    assert "can't be read" in picture.faults[0]


def test_numbers_that_are_none(runs_dir: Path, fake: FakeSlurm, clock: Clock):
    run = running(runs_dir)
    with run.metrics_file.open("a") as file:
        file.write('{"step": 1, "loss": NaN, "tokens_per_s": 1e400, "step_s": Infinity}\n')
        file.write(json.dumps({"step": 10**400, "loss": 10**400, "tokens_per_s": -1, "step_s": "x"}) + "\n")
    row = watching(runs_dir, fake, clock).refresh().rows[0]
    assert row.step >= 1
