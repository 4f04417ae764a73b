"""Trackers of a run that goes on: TensorBoard's files, a wandb server, and servers that hang."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from hpcdl.cli import main
from hpcdl.runs.store import RunDir
from hpcdl.sync import story
from hpcdl.worker import trackers
from tests.factory import tiny_spec
from tests.fake_wandb import FakeWandb
from tests.sync.making import ends, rewind, tracked, train

pytestmark = pytest.mark.timeout(240)


def until(holds: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        return []
    seen = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    seen.Reload()
    if tag not in seen.Tags()["scalars"]:
        return []
    return [(event.step, round(event.value, 4)) for event in seen.Scalars(tag)]


def as_written(run: RunDir, key: str = "loss") -> list[tuple[int, float]]:
    return [(row.step, round(row.values[key], 4)) for row in story.rows_of(run) if key in row.values]


# --- TensorBoard -------------------------------------------------------------------------------------------


def test_tensorboard_shows_one_curve_over_all_tries_and_all_nodes(runs_dir: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tracked(runs_dir, tracker="tensorboard", state="RUNNING")
    spec, board = tiny_spec(tracker__name="tensorboard"), run.path / "tensorboard"
    train(run, range(1, 9), loss=9.0)
    first = trackers.Live(spec, run)
    until(lambda: len(scalars(board, "loss")) == 7, "seven rows of the first try")
    first._courier.kill()  # the try is lost
    rewind(run, 5)
    second = trackers.start(spec, run, active=True)
    train(run, range(6, 13), attempt="0.1", late_s=50)
    second.finish()
    assert scalars(board, "loss") == as_written(run)
    for node in ("n1", "n2"):
        assert len(scalars(board, f"node/{node}/rss_bytes")) == 12
    assert len(list(board.iterdir())) == 1, "the lost try's file is gone"
    assert run.events() == []


def test_event_files_of_any_run(runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    run = tracked(runs_dir, tracker="none")
    train(run, range(1, 6))
    words = ["sync", "--runs-dir", str(runs_dir), "--tensorboard", str(tmp_path / "tb")]
    folder = tmp_path / "tb" / "tiny" / run.path.name
    assert main(words) == 0
    assert f"sent: 5 rows at {folder}" in capsys.readouterr().out
    train(run, range(6, 8))
    assert main(words) == 0
    assert main(words) == 0
    assert "up to date: 7 rows, sent" in capsys.readouterr().out
    assert scalars(folder, "loss") == as_written(run) and len(list(folder.iterdir())) == 1


@pytest.mark.slow
def test_it_goes_on_while_a_run_does(
    runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    run = tracked(runs_dir, state="RUNNING")
    train(run, range(1, 4))

    sleep = time.sleep

    def meanwhile(seconds: float) -> None:
        if seconds < 60:
            sleep(seconds)
            return
        train(run, range(4, 6))
        ends(run, "COMPLETED")

    monkeypatch.setattr("time.sleep", meanwhile)
    words = [
        "sync",
        "--runs-dir",
        str(runs_dir),
        "--follow",
        "--tensorboard",
        str(tmp_path / "tb"),
        run.path.name,
    ]
    assert main(words) == 0
    said = capsys.readouterr().out.splitlines()
    assert ["sent: 3 rows" in said[0], "sent: 5 rows" in said[1], len(said)] == [True, True, 2]


# --- wandb -------------------------------------------------------------------------------------------------


def test_offline_a_job_needs_no_wandb(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tracked(runs_dir)
    tracker = trackers.start(tiny_spec(tracker__name="wandb"), run, active=True)
    assert type(tracker) is trackers.Tracker
    assert "`hpcdl sync aaaa11112222` on the login node sends this run" in capsys.readouterr().out
    assert not (run.path / "wandb").exists()


def test_online_and_then_sync_are_one_run(
    runs_dir: Path, server: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tracked(runs_dir, state="RUNNING")
    train(run, range(1, 4))
    live = trackers.start(tiny_spec(tracker__name="wandb", tracker__mode="online"), run, active=True)
    train(run, range(4, 9))
    live.finish()
    (there,) = server.runs.values()
    assert there.curve("loss") == [(row.step, row.values["loss"]) for row in story.rows_of(run)]
    assert len(there.curve("node/n2/rss_bytes")) == 8, "of all nodes"
    ends(run, "COMPLETED")
    assert main(["sync", "--runs-dir", str(runs_dir)]) == 0
    assert "sent: 8 rows" in capsys.readouterr().out
    (there,) = server.runs.values()
    assert [row["_step"] for row in there.history] == list(range(1, 9))
    assert there.summary["state"] == "COMPLETED" and not server.deleted and run.events() == []


def test_a_server_that_hangs_is_nothing_to_the_training(runs_dir: Path, server: FakeWandb) -> None:
    server.fail = {"graphql": "hang", "stream": "hang"}
    run = tracked(runs_dir)
    began = time.monotonic()
    live = trackers.start(tiny_spec(tracker__name="wandb", tracker__mode="online"), run, active=True)
    started_s = time.monotonic() - began
    train(run, range(1, 4))
    began = time.monotonic()
    live.finish(0.5)
    assert started_s < 5 and time.monotonic() - began < 5  # wandb itself would wait for 90 s
    (event,) = run.events()
    assert (
        event["message"] == "tracker wandb: no answer within 0.5 s; `hpcdl sync aaaa11112222` sends the run"
    )


def test_what_killed_senders_left_is_removed(tmp_path: Path) -> None:
    from hpcdl.sync import sinks

    old, new = tmp_path / "hpcdl-sync-old", tmp_path / "hpcdl-sync-new"
    for folder in (old, new):
        (folder / "wandb").mkdir(parents=True)
        for path in (folder, folder / "wandb"):
            os.utime(path, (0, 0))
    (new / "wandb" / "run.wandb").write_text("")
    sinks.remove_old(tmp_path)
    assert not old.exists() and new.exists()


def test_a_tracker_that_can_not_start_is_one_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    tracker = trackers.start(tiny_spec(tracker__name="tensorboard"), run, active=True)
    tracker.finish()
    (event,) = run.events()
    assert event["event"] == "warning" and "tracker tensorboard: " in event["message"]


RANK = """
import os, sys
from pathlib import Path
from hpcdl.runs.store import RunDir
from hpcdl.worker import trackers
from tests.factory import tiny_spec
live = trackers.Live(tiny_spec(tracker__name="tensorboard"), RunDir(Path(sys.argv[1])))
print(live._courier._process.pid, flush=True)
sys.stdin.read()
"""


def test_the_sending_process_ends_with_its_rank(runs_dir: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tracked(runs_dir, tracker="tensorboard", state="RUNNING")
    train(run, range(1, 4))
    words = [sys.executable, "-c", RANK, str(run.path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    rank = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert rank.stdout is not None
    sender = psutil.Process(int(rank.stdout.readline()))
    until(lambda: scalars(run.path / "tensorboard", "loss"), "the first rows")
    rank.kill()
    rank.communicate()
    until(lambda: not sender.is_running() or sender.status() == psutil.STATUS_ZOMBIE, "the sender's end")
    assert scalars(run.path / "tensorboard", "loss")[-1][0] == 3, "the last row too"
