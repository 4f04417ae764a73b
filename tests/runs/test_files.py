"""Files on a full disk: what was there stays, what finds no room waits, and it is said."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from hpcdl.runs import files
from hpcdl.runs.files import append_line, last_line, read_lines, unwritten, write_atomic, write_json
from hpcdl.runs.private import read_text
from tests import disks


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_lines_wait_until_there_is_room(tmp_path: Path) -> None:
    code = """
from hpcdl.runs.files import append_line, last_line, read_lines, unwritten
file = folder / "events.jsonl"
append_line(file, {"n": 1})
limit(20)
append_line(file, {"n": 2, "text": "x" * 40})
append_line(file, {"n": 3})
answer = [file.read_text(), unwritten(file)]
limit()
append_line(file, {"n": 4})
answer += [[line["n"] for line in read_lines(file)], unwritten(file)]
"""
    answer, said = disks.limited(code, tmp_path)
    assert answer == ['{"n": 1}\n', 2, [1, 2, 3, 4], 0]
    assert said.count("its lines wait in memory") == 1 and "events.jsonl: File too large" in said


def test_lines_wait_on_a_disk_that_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with disks.small(tmp_path / "disk", "64k") as folder:
        file = folder / "metrics.jsonl"
        append_line(file, {"n": 0})
        filler = disks.fill(folder)
        for n in range(1, 200):
            append_line(file, {"n": n, "text": "x" * 100})
        there = [line["n"] for line in read_lines(file)]
        assert 0 < len(there) < 200 and there == list(range(len(there)))
        assert file.read_bytes().endswith(b"\n"), "a torn line was left"
        assert unwritten(file) == 200 - len(there)
        filler.unlink()
        append_line(file, {"n": 200})
        assert [line["n"] for line in read_lines(file)] == list(range(201)) and unwritten(file) == 0
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_line_after_a_torn_one_is_whole(tmp_path: Path) -> None:
    """Whose writer's node was lost, say."""
    file = tmp_path / "events.jsonl"
    file.write_text('{"n": 1}\n{"n": 2, "te')
    append_line(file, {"n": 3})
    assert [line["n"] for line in read_lines(file)] == [1, 3]


def test_another_fault_than_a_full_disk_is_raised(tmp_path: Path) -> None:
    file = tmp_path / "folder"
    file.mkdir()
    with pytest.raises(IsADirectoryError):
        append_line(file, {"n": 1})
    assert unwritten(file) == 0


def test_a_file_that_finds_no_room_stays_as_it_was(tmp_path: Path) -> None:
    code = """
import errno
from hpcdl.runs.files import write_atomic
file = folder / "result.json"
write_atomic(file, "old")
limit(100)
try:
    write_atomic(file, "new" * 1000)
except OSError as error:
    answer = [error.errno == errno.EFBIG, file.read_text(), sorted(path.name for path in folder.iterdir())]
"""
    assert disks.limited(code, tmp_path)[0] == [True, "old", ["result.json"]]


def test_a_small_file_is_overwritten_in_its_own_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "state.json"
    write_json(file, {"state": "RUNNING", "reason": "a reason that is longer than the next one"})

    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "open_text", no_room)
    for state in ({"state": "FAILED"}, {"state": "FAILED", "reason": "No space left on device " * 20}):
        write_json(file, state, into_own_block=True)
        assert json.loads(file.read_text()) == state
    with pytest.raises(OSError, match="No space left"):
        write_json(file, {"reason": "x" * 5000}, into_own_block=True)
    with pytest.raises(OSError, match="No space left"):
        write_json(file, {"state": "RUNNING"})
    assert json.loads(file.read_text())["state"] == "FAILED"


def test_the_state_is_told_on_a_full_disk(tmp_path: Path) -> None:
    with disks.small(tmp_path / "disk", "32k") as folder:
        file = folder / "state.json"
        write_atomic(file, json.dumps({"state": "RUNNING"}))
        disks.fill(folder)
        write_json(file, {"state": "FAILED", "reason": "x" * 1000}, into_own_block=True)
        assert json.loads(file.read_text())["state"] == "FAILED"
        assert names(folder) == ["filler", "state.json"]


def test_the_last_line_may_lie_far_from_the_end(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"loss": 1}\n' + "".join(f'{{"other": "{"x" * 300}"}}\n' for _ in range(50)) + '{"torn": '
    )
    assert last_line(file, having="loss") == {"loss": 1}
    assert last_line(file) == {"other": "x" * 300}
    assert last_line(file, having="loss", window=3000) is None


@pytest.mark.parametrize(
    ("text", "records"),
    [
        ("", []),
        ('{"a": 1}\n\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ('{"a": 1}\n{"a": 2', [{"a": 1}]),
        ('{"a": 1}\n{"b": 1}, {"c": 1}\n', [{"a": 1}]),
        ('{"a": "\u2028"}\n7\n', [{"a": "\u2028"}]),
    ],
)
def test_lines_are_told_apart_whatever_stands_between_them(
    tmp_path: Path, text: str, records: list[dict[str, int]]
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(text)
    assert read_lines(file) == records


def test_a_file_that_grows_while_it_is_read_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "state.json"
    file.write_text("{}")
    fstat = os.fstat

    def before_it_grew(descriptor: int) -> os.stat_result:
        found = fstat(descriptor)
        with file.open("a") as more:
            more.write(" " * 5000 + "!")
        return found

    monkeypatch.setattr(os, "fstat", before_it_grew)
    assert read_text(file) == "{}" + " " * 5000 + "!"


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 10_000, '{"half": '], ids=["deep", "long", "torn"])
def test_a_line_that_no_parser_takes_is_passed_over(line: str, tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text(f'{{"n": 1}}\n{line}\n{{"n": 2}}\n')
    assert [record["n"] for record in read_lines(file)] == [1, 2]
