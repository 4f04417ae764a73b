"""The first error of the first failing rank, among what many others say of what it did to them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from hpcdl.runs import failure, first, logs
from hpcdl.runs.store import RunDir
from tests.runs.making import make_run

CLOSED = (
    "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.{}]:{}. This is typically caused by"
)


def at(ms: int) -> str:
    return f"2026-01-01T00:00:{ms // 1000:02}.{ms % 1000:03}+00:00"


def put(run: RunDir, name: str, **fields: Any) -> None:
    values = {"time": at(0), "node": "n0", "rank": 0, "type": "RuntimeError", "message": "m", "traceback": ""}
    run.errors.mkdir(exist_ok=True)
    (run.errors / f"{name}.json").write_text(json.dumps({**values, **fields}))


@pytest.fixture
def run(runs_dir: Path) -> RunDir:
    return make_run(runs_dir, state="FAILED", reason="it failed")


def shown(run: RunDir) -> str:
    lines: list[str] = []
    logs.show_error(run, lines.append, lines.append)
    return "\n".join(lines)


def sixty_four(run: RunDir, guilty: int, *, skew_ms: int = 0) -> None:
    """A rank's ValueError, and what 63 others say of it, of nodes whose clocks are `skew_ms` ahead or behind."""
    shuffled = random.Random(0)
    for rank in range(64):
        node, late = f"n{rank // 8}", shuffled.randint(3, 900)
        if rank == guilty:
            trace = "Traceback (most recent call last):\nValueError: the loss is nan"
            fault = {"type": "ValueError", "message": "the loss is nan", "traceback": trace}
            put(run, f"try0.0-restart0-rank{rank}", rank=rank, node=node, time=at(5000), **fault)
        else:
            message = CLOSED.format(rank, shuffled.randint(1024, 65535))
            time = at(5000 + late - (skew_ms if rank // 8 % 2 else 0))
            put(run, f"try0.0-restart0-rank{rank}", rank=rank, node=node, time=time, message=message)


@pytest.mark.parametrize("skew_ms", [0, 1500])
def test_one_of_sixty_four(run: RunDir, skew_ms: int) -> None:
    sixty_four(run, 37, skew_ms=skew_ms)
    lines = [f"{at(ms)} [rank {rank}] step {ms}" for ms in range(0, 5000, 500) for rank in range(32, 40)]
    lines += [
        f"{at(5004)} [rank 37] Traceback (most recent call last):",
        f"{at(5004)} [rank 37] ValueError: x",
    ]
    (run.logs / "n4-try0.0.log").write_text("".join(f"{line}\n" for line in lines))
    found = first.of_run(run)
    assert found is not None
    assert (found.failure.rank, found.failure.node, found.failure.type) == (37, "n4", "ValueError")
    assert [line.split(" ", 1)[1] for line in found.before][-2:] == ["step 4000", "step 4500"]
    text = shown(run)
    assert "rank 37 on node n4, try 0.0" in text
    assert "63 other ranks failed after it\n  ranks 0-36, 38-63: RuntimeError:" in text
    assert text.count("Connection closed") == 1
    assert len(text.splitlines()) < 30


def test_what_the_agent_decided_goes_before_what_ranks_say(run: RunDir) -> None:
    put(run, "try0.0-restart0-rank1", rank=1, time=at(10), message="Connection closed by peer")
    lines = "terminate called\n  what():  boom"
    verdict = {"type": "SIGABRT", "message": "boom", "signal": 6, "by_torchrun": True, "traceback": lines}
    put(run, "try0.0-first-node0", rank=2, node="n1", time=at(900), **verdict)
    assert "its last lines\n  terminate called\n    what():  boom" in shown(run)


def test_a_hang_leads_to_the_stacks_of_all_ranks(run: RunDir) -> None:
    put(run, "try0.0-restart0-hang-node0", rank=1, type="Hang", kind="hang", message="no step for 300 s")
    for rank in range(3):
        (run.errors / f"try0.0-restart0-rank{rank}-stacks.txt").write_text("Thread …")
    text = shown(run)
    assert "what it is   a hang\nHang: no step for 300 s" in text
    assert text.endswith(f"the stacks of 3 ranks  {run.errors}/try0.0-restart0-rank*-stacks.txt")


def test_the_newest_failure_counts(run: RunDir) -> None:
    put(run, "try0.9-restart0-rank0", message="the ninth")
    put(run, "try0.10-restart0-rank0", message="got over", time=at(1000))
    put(run, "try0.10-restart1-rank1", rank=1, message="the last", time=at(2000))
    put(run, "try0.10-node1", rank=5, message="an end before", time=at(500))
    text = shown(run)
    assert "try 0.10, restart 1" in text
    assert "RuntimeError: the last" in text
    assert "got over" not in text
    assert "an end before" not in text


def test_a_run_that_has_gone_on(runs_dir: Path) -> None:
    run = make_run(runs_dir, state="COMPLETED")
    put(run, "try0.0-restart0-rank0", message="once")
    assert shown(run).endswith("the run has gone on since: it is COMPLETED")


def test_nobody_left_an_error(run: RunDir) -> None:
    assert shown(run) == "no rank or agent has left an error; FAILED: it failed"


def test_a_broken_connection_alone_is_what_went_wrong(run: RunDir) -> None:
    put(run, "try0.0-restart0-rank1", rank=1, time=at(10), message="Connection reset by peer")
    put(run, "try0.0-restart0-rank0", time=at(9000), type="ValueError", message="much later")
    found = first.of_run(run)
    assert found is not None
    assert found.failure.message == "Connection reset by peer"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["no endterminate called after throwing an instance of 'E'", "  what():  boom", "Fatal Python error: Aborted"],
         "terminate called after throwing an instance of 'E': boom"),
        (["Traceback (most recent call last):", "ModuleNotFoundError: No module named 'x'"],
         "ModuleNotFoundError: No module named 'x'"),
        (["torch.OutOfMemoryError: CUDA out of memory", "bye"], "torch.OutOfMemoryError: CUDA out of memory"),
        (["no endFatal Python error: Segmentation fault", "  File \"x\", line 1"],
         "Fatal Python error: Segmentation fault"),
        (["python: x.c:12: f: Assertion `p' failed.", "Fatal Python error: Aborted"],
         "python: x.c:12: f: Assertion `p' failed."),
        (["double free or corruption (out)"], "double free or corruption (out)"),
        (["python3: error while loading shared libraries: libcudart.so"],
         "python3: error while loading shared libraries: libcudart.so"),
        (["step 3", "step 4  loss 2.1", "no Error here: none"], ""),
    ],
)  # fmt: skip
def test_what_last_lines_tell(lines: list[str], said: str) -> None:
    assert failure.telling(lines) == said


def test_ranks_in_short() -> None:
    assert first.in_short([3]) == "rank 3"
    assert first.in_short([0, 1, 4, 5, 6, 9]) == "ranks 0, 1, 4-6, 9"
