"""The agent on a disk that is full: it goes on, and state.json says how it ended all the same."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from hpcdl.launch.child import Log
from tests import disks
from tests.launch.making import Agents, until


def test_the_state_says_what_happened(agents: Agents, tmp_path: Path) -> None:
    """Nothing of a worker's last words finds room: neither its record in errors/ nor its lines in the log."""
    (tmp_path / "node").mkdir()
    agents.environment["TMPDIR"] = str(tmp_path / "node")
    with disks.small(agents.runs_dir, "70m"):
        run = agents.make("full")
        process = agents.start()
        agents.pids()
        until(lambda: run.read_state().state == "RUNNING", "the agent has written its state")
        disks.fill(run.path)
        code, said = agents.end(process)
        state = run.read_state()
        assert code and (state.state, state.exit_code) == ("FAILED", code)
        host = os.uname().nodename
        assert state.reason.startswith(
            f"UnsavedError: the checkpoint of step 7 can't be written (rank 1, node {host})"
        )
        assert state.reason in said
        assert not list(run.errors.glob("*rank*")) and "line 199" not in agents.log()
        agents.close()


def test_a_log_counts_the_lines_that_found_no_room(tmp_path: Path) -> None:
    with disks.small(tmp_path / "disk", "64k") as folder:
        log = Log(folder / "n1.log")
        log.say("before")
        filler = disks.fill(folder)
        for number in range(300):
            log.write([b"[rank 0] line %d" % number])
        filler.unlink()
        log.say("after")
        lines = (folder / "n1.log").read_text().splitlines()
    there = [line for line in lines if re.search(r"\[rank 0\] line \d+$", line)]
    (note,) = [line for line in lines if "are not here" in line]
    assert note == f"[agent] {300 - len(there)} lines are not here: the disk was full"
    assert 0 < len(there) < 300 and lines[-1].endswith("[agent] after") and "before" in lines[0]


def test_a_log_that_can_not_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where no disk can be mounted: the write itself fails."""
    log = Log(tmp_path / "n1.log")
    real = os.write

    def fail(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", fail)
    log.say("one\ntwo")
    monkeypatch.setattr(os, "write", real)
    log.say("three")
    text = (tmp_path / "n1.log").read_text()
    assert "2 lines are not here" in text and text.endswith("[agent] three\n")
