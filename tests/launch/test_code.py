"""What git had is kept with the run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from hpcdl.launch import code


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    (folder / "a.txt").write_text("one\n")
    git(folder, "add", "a.txt")
    git(folder, "commit", "-qm", "first")
    monkeypatch.chdir(folder)
    return folder


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    files = code.snapshot()
    record = json.loads(files["mine.json"])
    assert len(record["commit"]) == 40 and record["branch"] == "main"
    assert record["changed"] is False and record["untracked"] == []
    assert "mine.diff" not in files


def test_changes_and_untracked_files_are_kept(checkout: Path) -> None:
    (checkout / "a.txt").write_bytes(b"tw\xff\n")
    (checkout / "sub").mkdir()
    (checkout / "new.txt").write_text("secret")
    files = code.snapshot()
    assert json.loads(files["mine.json"])["untracked"] == ["new.txt"]
    submission, run = checkout.parent / "submission", checkout.parent / "run"
    submission.mkdir(), run.mkdir()
    code.keep(files, submission)
    code.give(files, submission, run)
    diff = (run / "code" / "mine.diff").read_bytes()
    assert b"-one" in diff and b"+tw\xff" in diff and b"secret" not in diff
    git(checkout, "checkout", "a.txt")
    git(checkout, "apply", str(run / "code" / "mine.diff"))
    assert (checkout / "a.txt").read_bytes() == b"tw\xff\n"


def test_an_attempt_replaces_the_snapshot_of_the_one_before(checkout: Path) -> None:
    submission, run = checkout.parent / "submission", checkout.parent / "run"
    submission.mkdir(), run.mkdir()
    code.keep({"old.json": "{}\n"}, submission)
    code.give({"old.json": "{}\n"}, submission, run)
    code.keep({"new.json": "{}\n"}, submission)
    code.give({"new.json": "{}\n"}, submission, run)
    assert [p.name for p in (run / "code").iterdir()] == ["new.json"]


def test_outside_of_a_checkout_only_hpcdl_s_own_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"{tmp_path.name}.json" not in code.snapshot()
    monkeypatch.setenv("PATH", "")
    assert code.snapshot() == {}
