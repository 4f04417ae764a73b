from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcdl.launch import causes, memory
from hpcdl.launch.causes import Cause
from hpcdl.runs import first
from hpcdl.runs.store import RunDir

# As torchrun 2.13 prints it.
REPORT = """\
============================================================
hpcdl.worker.main FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : {time}
  host      : c2.cluster
  rank      : 2 (local_rank: 0)
  exitcode  : {code} (pid: 2340)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 2340
============================================================"""


def report(code: int = -9, time: str = "2026-01-31_12:00:00") -> list[str]:
    return REPORT.format(code=code, time=time).splitlines()


def make(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.errors.mkdir(parents=True)
    return run


def put(run: RunDir, name: str, **fields: Any) -> None:
    values = {"time": "2026-01-31T12:00:00.000+00:00", "node": "c1", "rank": 0, "type": "E", "message": "m"}
    (run.errors / f"{name}.json").write_text(json.dumps({**values, **fields}))


def test_the_earliest_is_the_root_cause(tmp_path: Path) -> None:
    run = make(tmp_path)
    put(
        run,
        "try0.0-restart0-rank0",
        time="2026-01-31T12:00:02.000+00:00",
        message="connection closed by peer",
    )
    put(
        run,
        "try0.0-restart0-rank3",
        time="2026-01-31T12:00:01.000+00:00",
        rank=3,
        node="c2",
        message="nan\nmore",
    )
    found = causes.find(run, "0.0", ["E failed"], "c1")
    assert found.reason == "E: nan (rank 3, node c2)"


def test_other_tries_do_not_count(tmp_path: Path) -> None:
    run = make(tmp_path)
    put(run, "try0.0-restart0-rank0", message="old")
    put(run, "try0.1-restart0-rank0", time="2026-01-31T13:00:00.000+00:00", message="new")
    assert causes.find(run, "0.1", [], "c1").message == "new"


def test_what_was_got_over_by_a_restart_does_not_count(tmp_path: Path) -> None:
    run = make(tmp_path)
    put(run, "try0.0-restart0-rank0", message="first")
    run.event("started")
    put(run, "try0.0-restart1-rank1", time="2026-01-31T12:01:00.000+00:00", message="second")
    assert causes.find(run, "0.0", [], "c1").message == "second"
    run.event("restarted", restart=1)  # told after rank 1 had failed
    assert causes.find(run, "0.0", [], "c1").message == "second"


def test_a_death_after_a_restart_is_not_the_first_errors_fault(tmp_path: Path) -> None:
    run = make(tmp_path)
    put(run, "try0.0-restart0-rank0", message="got over")
    run.event("started")
    run.event("restarted", restart=1)
    assert causes.find(run, "0.0", report(), "c2").type == "SIGKILL"


def test_a_death_by_signal_goes_before_what_it_did_to_the_others(tmp_path: Path) -> None:
    run = make(tmp_path)
    local = causes.from_torchrun(report(), "c2")
    # The other rank lost its connection at once; torchrun looks every 0.1 s and says whole seconds.
    put(run, "try0.0-restart0-rank1", time=local.time, rank=1, message="connection closed by peer")
    found = causes.find(run, "0.0", report(), "c2")
    assert found.reason == "SIGKILL: killed; by the kernel if memory ran out (rank 2, node c2)"


def test_an_older_error_goes_before_a_death_by_signal(tmp_path: Path) -> None:
    run = make(tmp_path)
    put(run, "try0.0-restart0-rank1", time="2020-01-01T00:00:00.000+00:00", rank=1, message="the real one")
    assert causes.find(run, "0.0", report(), "c2").message == "the real one"


def test_what_the_rank_said_itself_goes_before_its_exit_code(tmp_path: Path) -> None:
    run = make(tmp_path)
    late = "2030-01-01T00:00:00.000+00:00"
    put(run, "try0.0-restart0-rank2", time=late, rank=2, type="ValueError", message="nan")
    assert causes.find(run, "0.0", report(code=1), "c2").type == "ValueError"


def test_another_nodes_view_counts(tmp_path: Path) -> None:
    run = make(tmp_path)
    causes.record(run, "0.0", 1, causes.from_torchrun(report(), "c2"))
    assert causes.of_nodes(run, "0.0") == 1
    assert causes.of_nodes(run, "0.1") == 0
    assert causes.find(run, "0.0", ["the store is gone"], "c1").type == "SIGKILL"


def test_torchruns_last_words_where_nobody_is_to_blame(tmp_path: Path) -> None:
    words = ["RuntimeError: port in use", "", "======"]
    found = causes.find(make(tmp_path), "0.0", words, "c1")
    assert found.reason == "torchrun: RuntimeError: port in use (node c1)"
    assert causes.find(make(tmp_path / "b"), "0.0", [], "c1").message == "ended without a word"


def test_a_torn_error_file_is_left_out(tmp_path: Path) -> None:
    run = make(tmp_path)
    (run.errors / "try0.0-restart0-rank0.json").write_text('{"time": "2026')
    put(run, "try0.0-restart0-rank1", rank=1, message="whole")
    assert causes.find(run, "0.0", [], "c1").message == "whole"


def test_a_cause_without_words() -> None:
    assert (
        Cause(time="", type="KeyboardInterrupt", message="", node="c1").reason
        == "KeyboardInterrupt (node c1)"
    )


@pytest.mark.parametrize(
    ("kind", "message", "out"),
    [
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB.", True),
        ("MemoryError", "", True),
        ("_ArrayMemoryError", "Unable to allocate 1.00 TiB for an array with shape (1,)", True),
        (
            "RuntimeError",
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
            True,
        ),
        ("RuntimeError", "std::bad_alloc", True),
        ("OSError", "[Errno 12] Cannot allocate memory", True),
        ("RuntimeError", "connection closed by peer", False),
        ("ValueError", "the loss is nan", False),
        ("RuntimeError", "mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_what_says_that_memory_ran_out(tmp_path: Path, kind: str, message: str, out: bool) -> None:
    run = make(tmp_path)
    put(run, "try0.0-restart0-rank1", rank=1, type=kind, message=message)
    assert causes.find(run, "0.0", [], "c1").out_of_memory is out


def test_a_kill_by_the_kernel_is_told_from_one_by_hand(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert not causes.find(run, "0.0", report(), "c2").out_of_memory
    found = causes.find(run, "0.0", report(), "c2", killed_by_kernel=True)
    assert found.out_of_memory
    assert found.reason == (
        "SIGKILL: killed by the kernel: the node's memory, or the job's share of it, was used up (rank 2, node c2)"
    )
    # A data loader's death, say: the rank itself ended by an error of its own.
    assert not causes.from_torchrun(report(code=1), "c2", killed_by_kernel=True).out_of_memory


def test_another_nodes_kill_by_the_kernel_counts(tmp_path: Path) -> None:
    run = make(tmp_path)
    causes.record(run, "0.0", 1, causes.from_torchrun(report(), "c2", killed_by_kernel=True))
    assert causes.find(run, "0.0", ["the store is gone"], "c1").out_of_memory


def test_what_a_dead_worker_printed_last_is_why(tmp_path: Path) -> None:
    """C code's words before an abort, Python's before hpcdl is there: no error file says them."""
    aborted = ["step 3", "terminate called after throwing an instance of 'E'", "  what():  boom"]
    found = causes.find(make(tmp_path), "0.0", report(code=-6), "c2", last={2: aborted, 3: ["x"]})
    assert (
        found.reason == "SIGABRT: terminate called after throwing an instance of 'E': boom (rank 2, node c2)"
    )
    assert found.traceback.splitlines() == aborted
    lines = ["Traceback (most recent call last):", "ModuleNotFoundError: No module named 'x'"]
    found = causes.from_torchrun(report(code=1), "c2", last={2: lines})
    assert found.message == "the worker ended with code 1: ModuleNotFoundError: No module named 'x'"
    found = causes.from_torchrun(
        report(code=-9), "c2", last={2: ["RuntimeError: caught, before it was killed"]}
    )
    assert found.message == "killed; by the kernel if memory ran out"


def test_what_it_comes_from_is_written_down(tmp_path: Path) -> None:
    run = make(tmp_path)
    put(run, "try0.0-restart0-rank1", rank=1, message="Connection closed by peer")
    causes.decided(run, "0.0", causes.from_torchrun(report(), "c2", last={2: ["last words"]}))
    found = first.of_run(run)
    assert found is not None
    assert (found.failure.rank, found.failure.type, found.failure.traceback) == (2, "SIGKILL", "last words")
    assert found.others == (("E: Connection closed by peer", (1,)),)


@pytest.mark.parametrize(
    ("membership", "file", "text", "count"),
    [
        ("0::/slurm/job_12/step_0", "slurm/job_12/step_0/memory.events", "low 0\noom 3\noom_kill 2\n", 2),
        ("0::/host/path", "memory.events", "oom 1\noom_kill 1\n", 1),
        ("4:memory:/job_1\n0::/", "memory/job_1/memory.oom_control", "under_oom 0\noom_kill 7\n", 7),
        ("4:memory:/job_1", "memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n", None),
        ("0::/job", "elsewhere", "oom_kill 2\n", None),
        ("1:cpu:/", "memory.events", "oom_kill 2\n", None),
    ],
)
def test_the_kernels_count(tmp_path: Path, membership: str, file: str, text: str, count: int | None) -> None:
    place = tmp_path / "cgroups" / file
    place.parent.mkdir(parents=True)
    place.write_text(text)
    (tmp_path / "cgroup").write_text(membership + "\n")
    assert memory.kills(tmp_path / "cgroup", tmp_path / "cgroups") == count


def test_no_control_groups(tmp_path: Path) -> None:
    assert memory.kills(tmp_path / "none", tmp_path) is None
