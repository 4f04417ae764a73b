"""Run directories as rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcdl.errors import UsageError
from hpcdl.runs.files import append_line
from hpcdl.sync import push, record, story
from hpcdl.sync.sender import Live
from tests.runs.making import make_run
from tests.sync.making import at, ends, rewind, tracked, train


def test_a_row_a_step_with_what_all_nodes_measured_meanwhile(runs_dir: Path) -> None:
    run = tracked(runs_dir)
    append_line(run.metrics_file, {"step": 0, "eval_loss": 5.0, "time": at(-5)})
    train(run, range(1, 4))
    append_line(run.metrics_file, {"step": 3, "eval_loss": 3.0, "time": at(3.1)})
    rows = story.tell(run).rows
    assert [row.step for row in rows] == [0, 1, 2, 3]
    assert rows[0].values == {"eval_loss": 5.0}
    last = rows[3].values
    assert (last["loss"], last["eval_loss"]) == (3.97, 3.0) and "mfu" not in last
    for number, node in enumerate(("n1", "n2")):
        assert last[f"node/{node}/rss_bytes"] == 6008, "the highest of two samples"
        assert last[f"node/{node}/cpu_percent"] == pytest.approx(60), "their mean"
        assert last[f"node/{node}/rank{number}/rss_bytes"] == 3000
        assert last[f"node/{node}/gpu0/memory_used_bytes"] == 3


def test_a_lost_try_leaves_no_step_and_no_average(runs_dir: Path) -> None:
    run = tracked(runs_dir)
    train(run, range(1, 6), loss=9.0)
    rewind(run, 2)
    train(run, range(3, 5), loss=4.0, attempt="0.1", late_s=100)
    rows = story.tell(run).rows
    assert [row.step for row in rows] == [1, 2, 3, 4]
    assert [row.values["loss"] for row in rows] == [8.99, 8.98, 3.97, 3.96]
    # Between steps 2 and 3 lie the lost try's samples of steps 3, 4 and 5, which held more.
    assert rows[2].values["node/n1/rss_bytes"] == 6008


def test_what_is_measured_after_the_last_step_is_in_its_row(runs_dir: Path) -> None:
    """A run that ran out of memory shows how much it had."""
    run = tracked(runs_dir)
    train(run, range(1, 3))
    append_line(run.path / "system-n1.jsonl", {"time": at(9), "attempt": "0.0", "rss_bytes": 10**9})
    assert story.tell(run).rows[-1].values["node/n1/rss_bytes"] == 10**9


def test_a_run_that_never_logged_a_step_shows_its_nodes(runs_dir: Path) -> None:
    run = tracked(runs_dir)
    assert story.tell(run).rows == []
    append_line(run.path / "system-n1.jsonl", {"time": at(3), "rss_bytes": 5})
    (row,) = story.tell(run).rows
    assert (row.step, row.time, row.values) == (0, story.seconds(at(3)), {"node/n1/rss_bytes": 5})


def test_the_digest_changes_with_anything_that_is_sent(runs_dir: Path) -> None:
    run = tracked(runs_dir, state="RUNNING")
    train(run, range(1, 3))
    seen = {story.tell(run).digest}
    assert story.tell(run).digest in seen
    append_line(run.path / "system-n2.jsonl", {"time": at(2), "rss_bytes": 10**9})
    seen.add(story.tell(run).digest)
    ends(run, "COMPLETED")
    seen.add(story.tell(run).digest)
    run.result_file.write_text(json.dumps({"final_loss": 2.0, "sample": {"a": 1}}))
    told = story.tell(run)
    assert len(seen | {told.digest}) == 4
    assert told.summary["final_loss"] == 2.0 and told.summary["state"] == "COMPLETED"
    assert "sample" not in told.summary


def test_what_is_followed_has_the_same_rows(runs_dir: Path) -> None:
    run = tracked(runs_dir)
    live = Live(run)
    assert live.rows() == []
    train(run, range(1, 3))
    rows = live.rows()
    assert [row.step for row in rows] == [1], "an evaluation of step 2 may come yet"
    append_line(run.metrics_file, {"step": 2, "eval_loss": 1.0, "time": at(2.1)})
    train(run, range(3, 4))
    rows += live.rows() + live.rows(last=True)
    assert rows == story.tell(run).rows


def test_no_secret_leaves(runs_dir: Path) -> None:
    run = tracked(runs_dir)
    text = run.spec_file.read_text().replace(
        "name: tiny", "name: tiny\nnote: curl --token hf_abcdefghijklmnopq", 1
    )
    run.spec_file.write_text(text)
    assert story.read_head(run).config["note"] == "curl --token [hidden]"


def test_which_runs_want_wandb(runs_dir: Path) -> None:
    assert push.wants_wandb(tracked(runs_dir))
    assert not push.wants_wandb(tracked(runs_dir, "bbbb", tracker="tensorboard"))
    assert not push.wants_wandb(make_run(runs_dir, "cccc"))


@pytest.mark.parametrize("text", ["", "- a", "tracker: 3", "a: [", "\x00"])
def test_a_spec_that_is_none_is_said(runs_dir: Path, text: str) -> None:
    run = tracked(runs_dir)
    run.spec_file.write_text(text)
    with pytest.raises(UsageError, match="not an experiment that hpcdl wrote"):
        story.read_head(run)


@pytest.mark.parametrize("text", ["", "[]", '{"p": 3}', '{"p": {"digest": "a", "more": 1}}'])
def test_a_record_that_is_none_is_no_record(runs_dir: Path, text: str) -> None:
    run = tracked(runs_dir)
    (run.path / record.FILE).write_text(text)
    assert record.read(run, "p") == record.Place()
