"""`hpcdl sync` with wandb's own client, against a server that keeps what arrives (tests/fake_wandb)."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hpcdl.cli import main
from hpcdl.errors import ServerError, UsageError
from hpcdl.runs.files import append_line
from hpcdl.runs.store import RunDir
from hpcdl.sync import push, record, story
from hpcdl.sync.courier import Courier
from hpcdl.sync.push import CannotSendError, Push, Wish
from tests.fake_wandb import KEY, FakeWandb
from tests.sync.making import at, ends, rewind, tracked, train

pytestmark = pytest.mark.timeout(240)


class Sending:
    """Sends runs, and keeps what is said."""

    def __init__(self, courier: Courier, **wish: object) -> None:
        self.lines: list[str] = []
        self.push = Push(Wish(**{"limit_s": 60.0, **wish}), self.lines.append, courier)  # type: ignore[arg-type]

    def __call__(self, *runs: RunDir) -> str:
        self.lines.clear()
        self.push.send(runs)
        return "\n".join(self.lines)


@pytest.fixture
def send(courier: Courier, server: FakeWandb) -> Sending:
    return Sending(courier)


def as_sent(run: RunDir) -> list[tuple[int, float]]:
    return [(row.step, row.values["loss"]) for row in story.tell(run).rows if "loss" in row.values]


# --- one run, whole and once -------------------------------------------------------------------------------


def test_a_run_arrives_whole(runs_dir: Path, server: FakeWandb, send: Sending) -> None:
    run = tracked(runs_dir)
    (run.path / "sweep.json").write_text(json.dumps({"sweep": "sweep-7"}))
    run.result_file.write_text(json.dumps({"final_loss": 2.5}))
    train(run, range(1, 21))
    append_line(run.metrics_file, {"step": 20, "eval_loss": 3.0, "time": at(20.1)})
    assert "sent: 20 rows at http" in send(run)
    there = server.runs[run.path.name]
    assert there.curve("loss") == as_sent(run) and there.curve("eval_loss") == [(20, 3.0)]
    for node, rank in (("n1", 0), ("n2", 1)):
        assert len(there.curve(f"node/{node}/rss_bytes")) == 20, "of all nodes, not only the first"
        assert there.curve(f"node/{node}/rank{rank}/rss_bytes")[-1] == (20, 20000)
    assert there.history[4]["_timestamp"] == story.seconds(at(5)), "the time of the training"
    assert (there.group, there.tags, there.project, there.exit_code) == ("sweep-7", ["x"], "hpcdl", 0)
    assert there.display_name == "tiny-aaaa11112222"
    assert there.config["trainer"]["value"]["max_steps"] == 6
    assert there.summary["final_loss"] == 2.5 and there.summary["state"] == "COMPLETED"
    assert not any(KEY in text for text in (send.lines[0], (run.path / record.FILE).read_text()))
    assert not (run.path / "wandb").exists()


def test_what_is_there_is_not_sent_again(
    runs_dir: Path, server: FakeWandb, send: Sending, courier: Courier
) -> None:
    run = tracked(runs_dir)
    train(run, range(1, 6))
    send(run)
    asked = server.calls["graphql"]
    assert "up to date: 5 rows, sent" in send(run)
    assert server.calls["graphql"] == asked, "not even asked"
    (run.path / record.FILE).unlink()  # killed between the sending and the record
    assert "up to date: 5 rows are there" in send(run)
    (run.metrics_file).touch()
    assert "up to date: 5 rows are there" in send(run)
    assert server.runs[run.path.name].begun == 1
    everything = Sending(courier, named=False)
    assert everything(run) == "" and everything.push.tally.there == 1, "of many runs only those with news"


def test_a_run_that_goes_on_is_added_to(runs_dir: Path, server: FakeWandb, send: Sending) -> None:
    run = tracked(runs_dir, state="RUNNING")
    train(run, range(1, 9))
    assert "sent: 7 rows" in send(run), "step 8 may get an evaluation yet"
    append_line(run.metrics_file, {"step": 8, "eval_loss": 1.0, "time": at(8.1)})
    train(run, range(9, 13))
    ends(run, "COMPLETED")
    run.result_file.write_text(json.dumps({"final_loss": 2.5}))
    assert "sent: 12 rows" in send(run)
    (there,) = server.runs.values()
    assert there.curve("loss") == as_sent(run) and there.curve("eval_loss") == [(8, 1.0)]
    assert there.summary["state"] == "COMPLETED" and there.summary["final_loss"] == 2.5
    assert there.name == run.path.name and not server.deleted


def test_several_tries_are_one_curve(runs_dir: Path, server: FakeWandb, send: Sending) -> None:
    """Fact 18: segments of several tries with one id don't append reliably."""
    run = tracked(runs_dir, state="RUNNING")
    train(run, range(1, 9), loss=9.0)
    send(run)
    rewind(run, 5)  # steps 6, 7 and 8 are lost: another try makes them anew, with other losses
    train(run, range(6, 13), attempt="0.1", late_s=50)
    ends(run, "COMPLETED")
    assert "sent: 12 rows" in send(run)
    (there,) = server.runs.values()
    assert there.curve("loss") == as_sent(run), "no step twice, and none of the lost try"
    assert there.display_name == "tiny-aaaa11112222" and server.deleted == {run.path.name}


def test_a_run_that_was_deleted_there_is_sent_anew(runs_dir: Path, server: FakeWandb, send: Sending) -> None:
    run = tracked(runs_dir)
    train(run, range(1, 4))
    send(run)
    server.deleted.add(run.path.name)
    del server.runs[run.path.name]
    train(run, range(4, 6))
    assert "sent: 5 rows" in send(run)
    (there,) = server.runs.values()
    assert there.name == f"{run.path.name}-1" and there.curve("loss") == as_sent(run)


def test_a_failed_run_is_failed_there(runs_dir: Path, server: FakeWandb, send: Sending) -> None:
    run = tracked(runs_dir, state="OUT_OF_MEMORY", reason="rank 1: hf_abcdefghijklmnopq was killed")
    train(run, range(1, 3))
    send(run)
    there = server.runs[run.path.name]
    assert there.exit_code == 1
    assert there.summary["reason"] == "rank 1: [hidden] was killed"


def test_several_runs_a_line_each(runs_dir: Path, server: FakeWandb, send: Sending) -> None:
    good, empty, bad = (tracked(runs_dir, run_id) for run_id in ("good1", "empty1", "bad1"))
    for run in (good, bad):
        train(run, range(1, 3))
    bad.spec_file.write_text("[]")
    lines = send(bad, empty, good).splitlines()
    assert [line.split()[0] for line in lines] == ["bad1", "empty1", "good1"]
    assert "not an experiment that hpcdl wrote" in lines[0]
    assert "nothing to send yet" in lines[1] and "sent: 2 rows" in lines[2]
    assert send.push.tally.failed == ["bad1"]


def test_another_project(runs_dir: Path, server: FakeWandb, courier: Courier) -> None:
    run = tracked(runs_dir)
    train(run, range(1, 3))
    Sending(courier, project="p2", entity="team")(run)
    there = server.runs[run.path.name]
    assert (there.project, there.entity) == ("p2", "team")
    assert f"{server.url}/team/p2" in json.loads((run.path / record.FILE).read_text())


# --- what goes wrong ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_connection_that_breaks_is_made_again(runs_dir: Path, server: FakeWandb, send: Sending) -> None:
    """The client tries again by itself; nothing is there twice."""
    run = tracked(runs_dir)
    train(run, range(1, 6))
    server.fail, server.heals_after = {"stream": "reset"}, {"stream": 2}
    assert "sent: 5 rows" in send(run)
    assert server.calls["stream"] > 2 and server.runs[run.path.name].curve("loss") == as_sent(run)


def test_data_that_the_server_loses_is_no_success(
    runs_dir: Path, server: FakeWandb, courier: Courier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb 0.31 calls such a run finished."""
    monkeypatch.setattr(push, "TRIES", 1)
    run = tracked(runs_dir)
    train(run, range(1, 3))
    server.fail = {"stream": "lose"}
    send = Sending(courier, limit_s=3.0)
    with pytest.raises(ServerError, match="was not sent: the server doesn't have what was sent") as caught:
        send(run)
    assert caught.value.exit_code == 3
    assert record.read(run, f"{server.url}/hpcdl").sent is None
    server.fail = {}
    assert "sent: 2 rows" in send(run)
    (there,) = server.runs.values()
    assert there.curve("loss") == as_sent(run), "the one that lacks them is deleted"


def test_a_key_that_is_not_taken_ends_it_all(runs_dir: Path, server: FakeWandb, send: Sending) -> None:
    runs = [tracked(runs_dir, run_id) for run_id in ("one1", "two2")]
    for run in runs:
        train(run, range(1, 3))
    server.fail = {"graphql": "401"}
    with pytest.raises(
        CannotSendError, match=r"(?s)no API key that http.*wandb login.*WANDB_API_KEY"
    ) as caught:
        send(*runs)
    assert caught.value.exit_code == 2 and KEY not in str(caught.value)


def test_a_server_that_is_away(
    runs_dir: Path, server: FakeWandb, courier: Courier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "PAUSE_S", 0.0)
    run = tracked(runs_dir)
    train(run, range(1, 3))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    send = Sending(courier)
    with pytest.raises(ServerError, match=r"http://127.0.0.1:1 doesn't answer: .*refused"):
        send(run)
    assert [line.split()[2] for line in send.lines] == ["tried", "tried"]
    server.fail = {"graphql": "hang"}
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    with pytest.raises(ServerError, match="doesn't answer: timed out"):
        Sending(courier, limit_s=0.3)(run)


def said_without(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> str:
    train(tracked(runs_dir), range(1, 3))
    assert main(["sync", "--runs-dir", str(runs_dir)]) == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_no_key(
    runs_dir: Path, server: FakeWandb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    assert "wandb has no API key that" in said_without(runs_dir, capsys)


def test_no_wandb(
    runs_dir: Path, server: FakeWandb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(push.importlib.util, "find_spec", lambda name: None)
    assert f"{sys.executable} -m pip install 'wandb" in said_without(runs_dir, capsys)


COMMAND = "import sys; from hpcdl.cli import main; sys.exit(main(sys.argv[1:]))"


def start(runs_dir: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", COMMAND, "sync", "--runs-dir", str(runs_dir)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_killed_in_the_middle_and_started_twice(runs_dir: Path, server: FakeWandb) -> None:
    """kill -9 while rows are on their way; then two at once: each run is there once, and one of them sent it."""
    runs = [tracked(runs_dir, run_id) for run_id in ("one1", "two2")]
    for run in runs:
        train(run, range(1, 101))
    server.fail, server.fail_after = {"stream": "hang"}, {"stream": 1}
    first = start(runs_dir)
    assert server.arrived.wait(60)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    (half,) = server.runs
    server.fail = {}
    server.let_go.set()
    both = [start(runs_dir), start(runs_dir)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(text.count("sent: 100 rows at http") for text in said) == 2
    assert sum(text.count("up to date: 100 rows") for text in said) == 2
    assert half in server.deleted
    for run in runs:
        (there,) = (one for one in server.runs.values() if run.path.name in one.display_name)
        assert there.curve("loss") == as_sent(run)


# --- the command -------------------------------------------------------------------------------------------


def test_a_dry_run_sends_nothing(
    runs_dir: Path, server: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tracked(runs_dir), range(1, 4))
    tracked(runs_dir, "bbbb", tracker="none")
    tracked(runs_dir, "cccc")
    assert main(["sync", "--runs-dir", str(runs_dir), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"aaaa11112222  tiny  would send 3 rows to {server.url}/hpcdl" in said
    assert "cccc  tiny  nothing to send yet" in said and "bbbb" not in said
    assert "1 would be sent, 0 up to date, 1 with nothing yet" in said
    assert not server.calls


def test_nothing_to_send(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracked(runs_dir, tracker="none")
    assert main(["sync", "--runs-dir", str(runs_dir)]) == 0
    assert "has tracker=wandb (`hpcdl sync RUN` sends any run)" in capsys.readouterr().err
    assert main(["sync", "--runs-dir", str(runs_dir), "nope"]) == 2
    assert main(["sync", "--limit", "0"]) == 2
    assert "seconds from 1 to 86400" in capsys.readouterr().err


def test_a_silent_process_is_ended(server: FakeWandb, runs_dir: Path) -> None:
    run = tracked(runs_dir)
    own = Courier(server.url)
    order = {
        "do": "follow",
        "run": str(run.path),
        "to": "tensorboard",
        "place": "p",
        "folder": str(runs_dir / "tb"),
    }
    assert own.ask({**order, "limit_s": 1}, 0.01) == {"fault": "no answer within 0.01 s"}
    own.close()


HOLD = """
import sys
from pathlib import Path
from hpcdl.runs.store import RunDir
from hpcdl.sync import record
with record.held(RunDir(Path(sys.argv[1])), "wandb"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_sends_the_next_waits(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "WAITING_S", 0.0)
    run = tracked(runs_dir)
    train(run, range(1, 3))
    said = threading.Event()
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        said.set()

    work = Push(Wish(), say)
    place = work._place(story.read_head(run))
    words = [sys.executable, "-c", HOLD, str(run.path)]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    thread = threading.Thread(target=work.send, args=([run],))
    thread.start()
    assert said.wait(60)
    assert lines == ["aaaa11112222  tiny  waits: another hpcdl sync is sending it"]
    # What the other one has sent meanwhile is not sent again.
    sent = record.Sent(digest="d", stamp=record.stamp(run), rows=2, time="t")
    record.write(run, place, record.Place(sent=sent))
    other.communicate()
    thread.join(60)
    assert lines[1:] == ["aaaa11112222  tiny  up to date: 2 rows, sent t"]


def test_a_try_that_sends_itself_is_left_to_it(runs_dir: Path) -> None:
    run = tracked(runs_dir, state="RUNNING")
    train(run, range(1, 3))
    lines: list[str] = []
    work = Push(Wish(), lines.append)
    record.write(run, work._place(story.read_head(run)), record.Place(live=True))
    words = [sys.executable, "-c", HOLD, str(run.path)]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    work.send([run])
    other.communicate()
    assert lines == ["aaaa11112222  tiny  is sent by its own try, as it goes on"]


def test_an_unreadable_place(runs_dir: Path) -> None:
    with pytest.raises(UsageError):
        story.tell(RunDir(runs_dir / "none"))
