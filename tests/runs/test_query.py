from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hpcdl.errors import UsageError
from hpcdl.runs import query, store
from hpcdl.runs.reconcile import read
from hpcdl.runs.store import RunDir, all_runs
from tests.runs.making import ago, make_run, make_submission


@pytest.fixture
def runs(runs_dir: Path) -> list[RunDir]:
    made = [
        make_run(runs_dir, "aaaa11112222", created=ago(50), submission="t1", array_index=0),
        make_run(runs_dir, "aaaa33334444", created=ago(40), submission="t1", array_index=1),
        make_run(runs_dir, "bbbb11112222", name="lora", created=ago(30), job_id="77"),
        make_run(runs_dir, "123456789012", name="lora", created=ago(20), kind="local", submission=None),
    ]
    make_submission(runs_dir, "t1", job_id="123")
    (runs_dir / ".sweeps").mkdir()
    points = [{"run_id": "bbbb11112222", "overrides": []}, {"run_id": "aaaa11112222", "overrides": []}]
    (runs_dir / ".sweeps" / "sw1.json").write_text(json.dumps({"points": points}))
    (runs_dir / "latest").symlink_to("lora/bbbb11112222")
    return made


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("aaaa11112222", [0]),
        ("aaaa1", [0]),
        ("bb", [2]),
        ("123_1", [1]),
        ("123", [0, 1]),
        ("77", [2]),
        ("1234", [3]),
        ("tiny", [0, 1]),
        ("lora", [2, 3]),
        ("sw1", [2, 0]),
        ("latest", [2]),
    ],
)
def test_find(runs: list[RunDir], runs_dir: Path, text: str, found: list[int]) -> None:
    assert query.find(text, runs_dir) == [runs[i] for i in found]


def test_find_by_directory(runs: list[RunDir], runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert query.find(str(runs[0].path), Path("/nowhere")) == [runs[0]]
    monkeypatch.chdir(runs_dir)
    assert query.find("tiny/aaaa11112222/", Path("/nowhere")) == [runs[0]]


def test_one_of_an_experiments_runs_is_the_newest(runs: list[RunDir], runs_dir: Path) -> None:
    assert query.find_one("lora", runs_dir) == runs[3]
    with pytest.raises(UsageError, match=r"123 is 2 runs; name one of them:\n  aaaa11112222  tiny\n"):
        query.find_one("123", runs_dir)


def test_several_queries_name_each_run_once(runs: list[RunDir], runs_dir: Path) -> None:
    assert query.find_all(["123", "aaaa1", "latest"], runs_dir) == runs[:3]


def test_latest_without_the_link_is_the_newest(runs: list[RunDir], runs_dir: Path) -> None:
    (runs_dir / "latest").unlink()
    assert query.find("latest", runs_dir) == [runs[3]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("aaaa", "aaaa is the beginning of 2 run ids:\n  aaaa"),
        ("laetst", "nearest name: latest"),
        ("bbbb11112223", "nearest name: bbbb11112222"),
        ("999", "which has 4 runs"),
        ("123_9", "no run is called 123_9"),
        ("*", r"no run is called \*"),
        ("./nowhere/x", "no run's directory"),
    ],
)
def test_not_found(runs: list[RunDir], runs_dir: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        query.find(text, runs_dir)
    assert caught.value.exit_code == 2


def test_no_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        query.find("x", tmp_path / "none")
    with pytest.raises(UsageError, match="no run yet"):
        query.find("latest", tmp_path / "none")


def test_the_folder_of_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert query.runs_dir() == tmp_path / "runs"
    monkeypatch.setenv("HPCDL_RUNS", "/somewhere")
    assert query.runs_dir() == Path("/somewhere")
    assert query.runs_dir("x") == tmp_path / "x"


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are opened from now on."""
    files: list[str] = []
    open_really = os.open

    def noted(path: str | Path, *args: Any, **more: Any) -> int:
        files.append(str(path))
        return open_really(path, *args, **more)

    monkeypatch.setattr(os, "open", noted)
    return files


def test_a_job_is_found_by_its_submission_and_no_other_run_is_read(
    runs: list[RunDir], runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_file = runs_dir / ".submissions" / "t1" / "runs.txt"
    # As it was written before the folder of all runs was moved.
    runs_file.write_text("/elsewhere/tiny/aaaa11112222\n/elsewhere/tiny/aaaa33334444\n../../../x\n")
    files = opened(monkeypatch)
    reading = query.read_all(["123"], runs_dir)
    assert [view.run for view in reading.views] == runs[:2]
    assert [file for file in files if file.endswith("state.json")] == [
        str(run.state_file) for run in runs[:2]
    ]
    assert query.find("123_1", runs_dir) == [runs[1]]


def test_a_job_that_a_run_has_left_is_not_its_any_more(runs: list[RunDir], runs_dir: Path) -> None:
    (runs_dir / ".submissions" / "t1" / "runs.txt").write_text("".join(f"{run.path}\n" for run in runs[:2]))
    runs[0].update(submission="t2", job_id="200_0")
    make_submission(runs_dir, "t2", job_id="200")
    assert query.find("123", runs_dir) == [runs[1]]
    assert query.find("200_0", runs_dir) == [runs[0]]


def test_each_state_of_a_name_is_read_once(
    runs: list[RunDir], runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = opened(monkeypatch)
    assert [view.run for view in query.read_all(["lora", "lora"], runs_dir).views] == runs[2:]
    states = [file for file in files if file.endswith("state.json")]
    assert len(states) == 4, "two runs, named twice"
    files.clear()
    assert len(query.read_all(["lora"], runs_dir).views) == 2
    assert len([file for file in files if file.endswith("state.json")]) == 2


def test_a_folder_without_a_state_is_no_run(runs: list[RunDir], runs_dir: Path) -> None:
    (runs_dir / "lora" / "ffff").mkdir()
    (runs_dir / "lora" / "note.txt").write_text("x")
    assert query.find("lora", runs_dir) == runs[2:]
    with pytest.raises(UsageError, match="no run is called ffff"):
        query.find("ffff", runs_dir)


def test_somebody_elses_private_runs_are_not_told_of(
    runs: list[RunDir], runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(store, "read_text", denied)
    assert len(read(all_runs(runs_dir)).faults) == 4, "a file that may not be read is a fault"
    monkeypatch.setattr(os, "access", lambda path, how: False)
    assert read(all_runs(runs_dir)).faults == [], (
        "a folder that nobody lets one into is none of one's business"
    )
