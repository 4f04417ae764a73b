from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcdl.errors import UsageError
from hpcdl.runs import query
from hpcdl.runs.store import RunDir
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
