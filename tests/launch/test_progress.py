"""The policy after a failure, as tables."""

from __future__ import annotations

from typing import Any

import pytest

from hpcdl.errors import HpcdlError, LostPeerError
from hpcdl.launch import progress
from hpcdl.launch.causes import Cause
from hpcdl.launch.progress import Failure, Limits, verdict
from hpcdl.runs import kinds
from hpcdl.runs.kinds import NEVER_RESTART, Kind

PLENTY = Limits(max_restarts=10, max_requeues=10)
NONE = Limits(max_restarts=0, max_requeues=0)


def fail(kind: Kind = "killed", step: int = 0, saved: int = 0, **more: Any) -> Failure:
    return Failure(kind=kind, step=step, saved=saved, **more)


def restarted(step: int, saved: int = 0, kind: Kind = "killed") -> Failure:
    return fail(kind, step, saved, then="restart")


def requeued(step: int, saved: int = 0, kind: Kind = "killed") -> Failure:
    return fail(kind, step, saved, then="requeue")


@pytest.mark.parametrize(
    ("kind", "then"),
    [
        ("fault", "stop"),
        ("memory", "stop"),
        ("hang", "restart"),
        ("killed", "restart"),
        ("network", "restart"),
        ("disk", "restart"),
        ("unknown", "restart"),
        ("device", "requeue"),
        ("node", "requeue"),
        ("preempted", "requeue"),
        ("timeout", "requeue"),
    ],
)
def test_what_follows_the_first_failure(kind: Kind, then: str) -> None:
    decided = verdict([], fail(kind, 5, node="c2"), PLENTY)
    assert decided.then == then
    assert decided.exclude == (("c2",) if kind in ("node", "device") else ())
    assert decided.exit_code == (NEVER_RESTART if then == "stop" else 0)


@pytest.mark.parametrize("kind", kinds.WORDS)
def test_where_nothing_is_allowed_the_run_ends_with_the_workers_own_code(kind: Kind) -> None:
    decided = verdict([], fail(kind, 5, exit_code=137), NONE)
    assert decided.then == "stop"
    assert decided.exit_code == (NEVER_RESTART if kind in ("fault", "memory") else 137)
    assert decided.why.startswith("not tried again")


@pytest.mark.parametrize(
    ("history", "now", "limits", "then"),
    [
        # In place first, then the queue, then the end.
        ([], fail("network", 3), Limits(max_restarts=1, max_requeues=1), "restart"),
        (
            [restarted(3, kind="network")],
            fail("network", 3),
            Limits(max_restarts=1, max_requeues=1),
            "requeue",
        ),
        (
            [restarted(3, kind="network"), requeued(3, kind="network")],
            fail("network", 3),
            Limits(max_restarts=1, max_requeues=1),
            "restart",
        ),
        (
            [restarted(3, kind="network"), requeued(3, kind="network"), restarted(3, kind="network")],
            fail("network", 3),
            Limits(max_restarts=1, max_requeues=1),
            "stop",
        ),
        # A later step, or a later checkpoint, and everything counts anew.
        ([restarted(3)], fail(step=4), Limits(max_restarts=1, max_requeues=0), "restart"),
        ([restarted(9, 2)], fail(step=8, saved=7), Limits(max_restarts=1, max_requeues=0), "restart"),
        ([restarted(9, 7)], fail(step=8, saved=7), Limits(max_restarts=1, max_requeues=0), "stop"),
        # The same step again and again, however much is allowed.
        ([restarted(3), restarted(3)], fail(step=3), PLENTY, "stop"),
        ([restarted(3), requeued(3)], fail(step=3), PLENTY, "stop"),
        ([restarted(3), restarted(2)], fail(step=3), PLENTY, "restart"),
        ([restarted(3), restarted(3, kind="hang")], fail(step=3), PLENTY, "restart"),
        ([restarted(3), restarted(3, 3)], fail(step=3, saved=3), PLENTY, "restart"),
        # No step was done since what was saved: some more.
        ([restarted(3, 3)] * 3, fail(step=3, saved=3), PLENTY, "restart"),
        ([restarted(3, 3)] * 4, fail(step=3, saved=3), PLENTY, "stop"),
        # What goes on around a run says nothing of it: only the limits count.
        ([restarted(0, kind="network")] * 5, fail("network"), PLENTY, "restart"),
        ([requeued(0, kind="node")] * 9, fail("node"), PLENTY, "requeue"),
        ([requeued(0, kind="node")] * 10, fail("node"), PLENTY, "stop"),
        ([requeued(7, 7, "preempted")] * 9, fail("preempted", 7, 7), PLENTY, "requeue"),
        # Progress counts, not time limits.
        ([requeued(i, i, "timeout") for i in range(1, 50)], fail("timeout", 50, 50), PLENTY, "requeue"),
        ([requeued(0, 0, "timeout")] * 2, fail("timeout"), PLENTY, "stop"),
    ],
)
def test_history(history: list[Failure], now: Failure, limits: Limits, then: str) -> None:
    assert verdict(history, now, limits).then == then


def test_no_history_goes_on_for_ever() -> None:
    for kind in kinds.WORDS:
        past: list[Failure] = []
        while True:
            decided = verdict(past, fail(kind, 5, 5), Limits(max_restarts=3, max_requeues=4))
            if decided.then == "stop":
                break
            past.append(fail(kind, 5, 5, then=decided.then))
            assert len(past) <= 3 + 4 * (3 + 1), kind


@pytest.mark.parametrize(
    ("history", "now", "why"),
    [
        ([], fail("fault"), "not tried again: the same would happen again"),
        ([], fail("memory"), "not tried again: it would run out again at the same size"),
        (
            [restarted(12), restarted(12)],
            fail(step=12),
            "3 tries in a row ended by a worker's death at step 12, without progress",
        ),
        (
            [requeued(0, 0, "timeout")] * 2,
            fail("timeout"),
            "3 tries in a row ended by the time limit at step 0, without progress: "
            "cluster.time_min is too short for a step",
        ),
        (
            [requeued(0, kind="node")] * 10,
            fail("node"),
            "no requeue is left (cluster.max_requeues=10 without progress)",
        ),
        ([], fail("node", node="c3"), "requeue 1 of 10 without progress, off node c3"),
        ([restarted(3)], fail(step=2), "restart in place 2 of 10"),
    ],
)
def test_the_reason_is_said(history: list[Failure], now: Failure, why: str) -> None:
    assert verdict(history, now, PLENTY).why == why


def test_a_node_that_may_not_be_left_out_ends_the_run() -> None:
    limits = Limits(max_restarts=1, max_requeues=1, can_exclude=False)
    decided = verdict([], fail("node", node="c3"), limits)
    assert (decided.then, decided.why) == ("stop", "node c3 is not fit, and the job can't be kept off it")


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def started(attempt: str, **more: Any) -> dict[str, Any]:
    return {"event": "started", "try": attempt, **more}


def test_history_is_read_from_the_events_that_tell_it() -> None:
    first, second = fail("killed", 5, 4, reason="SIGKILL (rank 1)"), fail("node", 9, 8, node="c2")
    told = [
        started("0.0"),
        {"event": "restarting", **progress.details(first, verdict([], first, PLENTY))},
        {"event": "restarted", "restart": 1},
        {"event": "requeued", **progress.details(second, verdict([], second, PLENTY))},
        started("0.1", saved=8),
    ]
    found = progress.history(told, 0)
    assert [(one.kind, one.step, one.saved, one.then) for one in found] == [
        ("killed", 5, 4, "restart"),
        ("node", 9, 8, "requeue"),
    ]
    assert found[1].node == "c2" and told[3]["exclude"] == ["c2"]


def test_a_try_that_left_no_word_counts_as_a_lost_node() -> None:
    told = [
        started("0.0"),
        {"event": "requeued", "reason": "Slurm put it back"},
        {"event": "lost", "saved": 4},
    ]
    (silent,) = progress.history(told, 0)
    assert (silent.kind, silent.saved, silent.then) == ("node", 4, "requeue")


def test_a_new_launch_begins_anew() -> None:
    told = [started("0.0"), {"event": "restarting", "kind": "killed", "step": 3}, {"event": "submitted"}]
    assert progress.history(told, 1) == []
    assert progress.history([*told, started("1.0")], 1) == []
    assert len(progress.history(told[:2], 0)) == 1


@pytest.mark.parametrize(
    ("type_name", "message", "more", "kind"),
    [
        ("ImportError", "cannot import name 'x'", {}, "fault"),
        ("ModuleNotFoundError", "No module named 'x'", {}, "fault"),
        ("SyntaxError", "invalid syntax", {}, "fault"),
        ("HpcdlError", "the loss is nan at step 3: lower optim.lr", {}, "fault"),
        ("LostPeerError", "rank 1 got no answer", {"bases": ("HpcdlError", "Exception")}, "network"),
        ("UsageError", "usage: Connection closed by peer", {"bases": ("HpcdlError", "Exception")}, "fault"),
        ("FileNotFoundError", "[Errno 2] No such file or directory: 'x.jsonl'", {"number": 2}, "fault"),
        ("RuntimeError", "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", {}, "fault"),
        (
            "DistBackendError",
            "ncclInvalidUsage: NCCL error",
            {"bases": ("DistError", "RuntimeError")},
            "fault",
        ),
        ("AcceleratorError", "CUDA error: device-side assert triggered", {}, "fault"),
        ("ExitCode", "ended with code 78", {"code": 78}, "fault"),
        ("torchrun", "ModuleNotFoundError: No module named 'torch'", {}, "fault"),
        ("OutOfMemoryError", "CUDA out of memory.", {"bases": ("RuntimeError",)}, "memory"),
        ("SIGKILL", "killed", {"by_signal": True, "by_kernel": True}, "memory"),
        ("MemoryError", "", {}, "memory"),
        ("SIGKILL", "killed", {"by_signal": True}, "killed"),
        ("SIGSEGV", "killed by this signal", {"by_signal": True}, "killed"),
        ("RuntimeError", "DataLoader worker (pid 7) is killed by signal: Killed.", {}, "killed"),
        (
            "RuntimeError",
            "[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5",
            {},
            "network",
        ),
        ("DistBackendError", "NCCL error in: x, ncclRemoteError: remote peer has died", {}, "network"),
        ("DistNetworkError", "The client socket has timed out", {"bases": ("DistError",)}, "network"),
        ("ConnectionResetError", "", {"bases": ("ConnectionError", "OSError"), "number": 104}, "network"),
        ("torchrun", "torch.distributed.elastic.rendezvous.api.RendezvousTimeoutError: late", {}, "network"),
        ("OSError", "[Errno 116] Stale file handle", {"number": 116}, "disk"),
        ("OSError", "[Errno 5] Input/output error", {"number": 5}, "disk"),
        ("SafetensorError", "I/O error: No space left on device (os error 28)", {}, "disk"),
        ("AcceleratorError", "CUDA error: uncorrectable ECC error encountered", {}, "device"),
        (kinds.HANG, "no step for 300 s", {}, "hang"),
        (kinds.PREFLIGHT, "the disk is full", {}, "node"),
        ("ExitCode", "the worker ended with code 3 and said nothing", {"code": 3}, "unknown"),
        ("torchrun", "ended without a word", {}, "unknown"),
    ],
)
def test_kinds(type_name: str, message: str, more: dict[str, Any], kind: Kind) -> None:
    assert kinds.kind_of(type_name, message, **more) == kind


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (
            raised_from(HpcdlError("can't be written: [Errno 28] No space left on device"), OSError(28, "x")),
            "disk",
        ),
        (raised_from(HpcdlError("model.path: no such file"), FileNotFoundError(2, "x")), "fault"),
        (HpcdlError("lower optim.lr: No space left on device"), "fault"),
        (
            raised_from(LostPeerError("rank 1 got no answer"), RuntimeError("RPC ran for more than 2 s")),
            "network",
        ),
        (ImportError("x"), "fault"),
        (OSError(116, "Stale file handle"), "disk"),
        (BrokenPipeError(32, "Broken pipe"), "network"),
        (MemoryError(), "memory"),
    ],
)
def test_kinds_of_exceptions(error: Exception, kind: Kind) -> None:
    assert kinds.of_exception(error) == kind


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (Cause(time="", type="SIGKILL", message="", node="c1", signal=9), 137),
        (Cause(time="", type="ExitCode", message="", node="c1", code=3), 3),
        (Cause(time="", type="ConnectionError", message="", node="c1"), 1),
        (Cause(time="", type="ValueError", message="", node="c1"), NEVER_RESTART),
    ],
)
def test_the_runs_exit_code_is_the_ranks_own(cause: Cause, code: int) -> None:
    assert progress.of_cause(cause, 7, step=9).exit_code == code
    assert progress.of_cause(cause, 7, step=9).step == 9
