from __future__ import annotations

import json
import multiprocessing
import threading
from pathlib import Path

import pytest

from hpcdl.errors import UsageError
from hpcdl.runs import store
from hpcdl.runs.reconcile import read
from hpcdl.runs.store import RunDir, all_runs
from tests.runs.making import make_run, make_submission


def test_a_newer_versions_keys_are_ignored_and_kept(runs_dir: Path) -> None:
    run = make_run(runs_dir)
    plain = json.loads(run.state_file.read_text())
    del plain["restarts"], plain["node_list"]
    run.state_file.write_text(json.dumps({**plain, "colour": "blue"}))
    state = run.read_state()
    assert (state.restarts, state.node_list) == (0, ())
    run.update(reason="x")
    assert json.loads(run.state_file.read_text())["colour"] == "blue"


def test_a_state_of_a_newer_version(runs_dir: Path) -> None:
    run = make_run(runs_dir)
    run.state_file.write_text(json.dumps({**json.loads(run.state_file.read_text()), "state": "HIBERNATING"}))
    assert run.read_state().state == "UNKNOWN"
    assert "HIBERNATING" in run.read_state().reason


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"state": "RUNNING"}', "\xff"])
def test_a_foreign_state_file(runs_dir: Path, text: str) -> None:
    run = make_run(runs_dir)
    run.state_file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match="not a state file that hpcdl wrote"):
        run.read_state()
    good = make_run(runs_dir, "bbbb")
    reading = read(all_runs(runs_dir))
    assert [view.run for view in reading.views] == [good]
    assert len(reading.faults) == 1


def test_permission_denied_is_a_clear_message(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(runs_dir)

    def denied(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store, "read_text", denied)
    with pytest.raises(UsageError, match="you may not read it"):
        run.read_state()


def test_no_runs_yet(tmp_path: Path) -> None:
    assert list(all_runs(tmp_path / "none")) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can't be read"):
        list(all_runs(tmp_path / "file"))


def test_the_job_id_of_a_pending_run_comes_from_its_submission(runs_dir: Path) -> None:
    run = make_run(runs_dir, array_index=4)
    assert run.read_state().job_id is None
    make_submission(runs_dir, job_id="123")
    assert run.read_state().job_id == "123_4"


def test_update_on_old_knowledge_changes_nothing(runs_dir: Path) -> None:
    run = make_run(runs_dir, state="RUNNING")
    old = run.read_state()
    run.update(state="COMPLETED", exit_code=0)
    stands = run.update(expect=old, event=("failed", {}), state="FAILED")
    assert stands.state == run.read_state().state == "COMPLETED"
    assert run.events() == []


def _replace(path: Path, count: int) -> None:
    run = RunDir(path)
    for number in range(count):
        run.update(restarts=run.read_state().restarts + 1, reason=f"{number} " * 200)


def test_readers_never_see_a_torn_file(runs_dir: Path) -> None:
    run = make_run(runs_dir, state="RUNNING")
    writer = multiprocessing.get_context("spawn").Process(target=_replace, args=(run.path, 1000))
    writer.start()
    seen: list[int] = []
    faults: list[BaseException] = []

    def read_on() -> None:
        try:
            while writer.is_alive():
                seen.append(run.read_state().restarts)
        except BaseException as error:
            faults.append(error)

    readers = [threading.Thread(target=read_on) for _ in range(3)]
    for reader in readers:
        reader.start()
    writer.join(timeout=120)
    for reader in readers:
        reader.join(timeout=10)
    assert faults == []
    assert run.read_state().restarts == 1000
    assert len(set(seen)) > 10, "the readers really read while it was written"
    assert writer.exitcode == 0
