from __future__ import annotations

from pathlib import Path

import pytest

from hpcdl.errors import RunFailedError
from hpcdl.launch import before, progress
from hpcdl.runs.store import RunDir
from hpcdl.spec import ClusterSpec
from tests.fake_slurm import FakeSlurm
from tests.launch.making import make_runs


@pytest.fixture
def run(tmp_path: Path, slurm: FakeSlurm) -> RunDir:
    slurm.set(addresses={"n1": "n1", "n2": "n2"}, node_states={"n1": "IDLE", "n2": "DOWN*+CLOUD"})
    (made,) = make_runs(tmp_path / "runs", ClusterSpec(kind="slurm", nodes=2))
    made.event("submitted")
    return made


def began(run: RunDir, attempt: str) -> None:
    run.event("started", **{"try": attempt, "node_list": ["n1", "n2"]})


def test_the_first_try_has_none_before(run: RunDir) -> None:
    assert before.lost(run, "0.0") is None


@pytest.mark.parametrize("by_poll", [True, False])
def test_a_try_without_a_last_word(run: RunDir, by_poll: bool) -> None:
    began(run, "0.0")
    if by_poll:
        run.event("requeued", reason="Slurm put the job back into its queue", way="slurm", found_by="poll")
    kind, details = before.lost(run, "0.1") or ("", {})
    assert (kind, details["try"], details["down"]) == ("lost", "0.0", ["n2"])
    expected = "try 0.0 on n1, n2 left no last word: a node was lost: n2 is DOWN*+CLOUD"
    assert details["message"] == expected


def test_slurm_may_have_the_node_back_already(run: RunDir, slurm: FakeSlurm) -> None:
    slurm.set(node_states={})
    began(run, "0.0")
    _, details = before.lost(run, "0.1") or ("", {})
    assert details["message"].endswith("left no last word: a node was lost, or Slurm has ended it")


@pytest.mark.parametrize(
    ("kind", "details"),
    [
        ("requeued", {"kind": "node", "way": "requeue"}),
        ("requeued", {"reason": "requeued by Slurm; saved", "way": "slurm"}),
        ("restarting", {"kind": "killed"}),
        ("failed", {}),
    ],
)
def test_a_try_that_has_spoken(run: RunDir, kind: str, details: dict[str, str]) -> None:
    began(run, "0.0")
    run.event(kind, **details)
    assert before.lost(run, "0.1") is None


def test_tries_that_slurm_loses_again_and_again_end_the_run(run: RunDir) -> None:
    for number in range(5):
        began(run, f"0.{number}")
        before.tell(run, f"0.{number + 1}", 5)
    began(run, "0.5")
    with pytest.raises(
        RunFailedError, match=r"left no last word.*no requeue is left \(cluster.max_requeues=5"
    ):
        before.tell(run, "0.6", 5)
    assert sum(event["event"] == "lost" for event in run.events()) == 6


def test_but_not_while_they_get_ahead(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(9):
        monkeypatch.setattr(progress, "saved", lambda run, number=number: 10 * number)
        began(run, f"0.{number}")
        before.tell(run, f"0.{number + 1}", 0)
