"""The parameter server: by itself, against DDP, asynchronous with bounded staleness, and with dead peers."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

import pytest
import torch
from torch import nn

from tests.worker.conftest import Workers, until
from tests.worker.test_local import convex

pytestmark = pytest.mark.torch

SERVER = {"parallel__name": "param_server"}
ASYNC = {**SERVER, "parallel__mode": "async"}


def server(workers: int, *, asynchronous: bool, max_staleness: int = 0, momentum: float = 0.0) -> Any:
    from hpcdl.distributed.server import Server

    return Server(
        [nn.Parameter(torch.tensor([1.0, 2.0]))],
        lambda parameters: torch.optim.SGD(parameters, lr=0.0, momentum=momentum),
        workers, asynchronous=asynchronous, max_staleness=max_staleness,
    )  # fmt: skip


def push(worker: int, gradient: list[float], version: int, **more: Any) -> Any:
    from hpcdl.distributed.server import Push

    settings = {"learning_rate": 1.0, "max_norm": None, **more}
    return Push(worker, [torch.tensor(gradient)], version, **settings)


def test_synchronous_waits_for_all_and_takes_their_mean() -> None:
    made = server(3, asynchronous=False)
    answers = [made.push(push(2, [3.0, 0.0], 0)), made.push(push(0, [0.0, 3.0], 0))]
    assert not any(answer.done() for answer in answers)
    assert made.missing() == [1]
    assert made.weights().tensors[0].tolist() == [1.0, 2.0]
    answers.append(made.push(push(1, [3.0, 3.0], 0)))
    assert made.missing() == []
    for answer in answers:
        norm, weights = answer.wait()
        assert norm == pytest.approx(8**0.5)
        assert weights.version == 1
        assert weights.tensors[0].tolist() == [-1.0, 0.0]


def test_synchronous_clips_the_whole_gradient() -> None:
    made = server(2, asynchronous=False)
    made.push(push(0, [6.0, 0.0], 0, max_norm=1.0))
    norm, weights = made.push(push(1, [0.0, 8.0], 0, max_norm=1.0)).wait()
    assert norm == pytest.approx(5.0)
    assert weights.tensors[0].tolist() == pytest.approx([1.0 - 0.6, 2.0 - 0.8])


def test_asynchronous_applies_at_once_a_share_of_the_rate() -> None:
    made = server(2, asynchronous=True)
    made.push(push(0, [1.0, 0.0], 0)).wait()
    assert made.weights().tensors[0].tolist() == [0.5, 2.0]
    made.push(push(1, [0.0, 1.0], 0)).wait()
    assert made.weights().tensors[0].tolist() == [0.5, 1.5]
    assert made.staleness.tolist() == [2, 1, 1]


def test_who_is_ahead_waits_for_the_slowest() -> None:
    """Stale synchronous parallel: after s + 1 steps that another has not done, no weights are given out."""
    made = server(2, asynchronous=True, max_staleness=1)
    for step in range(2):
        fetched = made.fetch(0)
        assert fetched.done(), step
        made.push(push(0, [0.0, 0.0], fetched.wait().version)).wait()
    waiting = made.fetch(0)
    assert not waiting.done()
    slow = made.fetch(1)
    assert slow.done()
    made.push(push(1, [2.0, 0.0], slow.wait().version)).wait()
    assert waiting.done()
    assert waiting.wait().version == 3  # with what it waited for
    assert waiting.wait().tensors[0].tolist() == [0.0, 2.0]


def test_a_push_beyond_the_bound_is_refused() -> None:
    made = server(2, asynchronous=True, max_staleness=1)
    assert made.bound == 3
    for _ in range(4):
        made.push(push(0, [0.0, 0.0], made.version)).wait()
    with pytest.raises(AssertionError, match="a push is 4 updates late; 3 at most"):
        made.push(push(1, [0.0, 0.0], 0))


@pytest.mark.parametrize("case", [{}, {"peft__name": "lora", "peft__rank": 4}, {"optim__name": "sgd"}])
def test_synchronous_is_ddp(workers: Workers, case: dict[str, Any]) -> None:
    case = {
        **case,
        "trainer__max_steps": 20,
        "task__name": "sft",
        "data__packing": False,
        "data__seq_len": 64,
    }
    ddp = workers.train(2, **case)
    served = workers.train(2, **SERVER, **case)
    assert served.losses() == pytest.approx(ddp.losses(), rel=1e-5)
    assert served.evaluations() == pytest.approx(ddp.evaluations(), rel=1e-5)
    norms = [[m["grad_norm"] for m in f.run.metrics() if "loss" in m] for f in (served, ddp)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert served.result()["staleness_max"] == 0


def test_one_worker_needs_no_rendezvous_of_its_own(workers: Workers) -> None:
    alone, served = workers.train(1), workers.train(1, **ASYNC)
    assert served.losses() == pytest.approx(alone.losses(), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_asynchronous_converges_on_a_convex_problem(workers: Workers, optimizer: str) -> None:
    how = {"optimizer": optimizer, "rate": 0.5 if optimizer == "sgd" else 0.05, "max_norm": 1.0, "steps": 200}
    one = convex(workers, "one", 1, **how)
    settings = {"asynchronous": True, "max_staleness": 2, "timeout_s": 60}
    served = convex(workers, "param_server", 4, settings=settings, **how)
    assert one["final"] < 0.8 * one["losses"][0]
    assert served["final"] == pytest.approx(one["final"], rel=0.05)
    assert 0 < served["report"]["staleness_mean"] <= served["report"]["staleness_max"] <= 3 * 5


@pytest.mark.parametrize("max_staleness", [0, 3])
def test_a_slow_worker_stays_within_the_bound(workers: Workers, max_staleness: int) -> None:
    settings = {"asynchronous": True, "max_staleness": max_staleness, "timeout_s": 60}
    served = convex(workers, "param_server", 3, settings=settings, steps=25, slow=1, slow_s=0.1)
    most = served["report"]["staleness_max"]
    assert most <= 2 * (2 * max_staleness + 1)
    if max_staleness:
        assert most > 2  # the others did run ahead of it


def test_asynchronous_llama_comes_close_to_ddp(workers: Workers) -> None:
    case = {"trainer__max_steps": 30, "optim__lr": 0.003}
    ddp = workers.train(2, **case)
    served = workers.train(4, **ASYNC, **case)
    last = served.evaluations()[30]
    assert last == pytest.approx(ddp.evaluations()[30], rel=0.05)
    assert last < 0.8 * served.evaluations()[0]
    result = served.result()
    assert 0 < result["staleness_mean"] <= result["staleness_max"] <= 3 * 5
    lines = [m for m in served.run.metrics() if "loss" in m]
    assert [m["step"] for m in lines] == list(range(1, 31))
    assert all({"staleness_mean", "staleness_max"} <= set(m) for m in lines)


def test_a_worker_that_hangs_is_named(workers: Workers) -> None:
    _stop_one(workers, 1, "no gradients from rank 1 for 2 s (parallel.rpc_timeout_s)")


def test_a_server_that_hangs_is_told(workers: Workers) -> None:
    _stop_one(workers, 0, "rank 1 got no answer from the parameter server on rank 0")


def _stop_one(workers: Workers, rank: int, said: str) -> None:
    """One rank is frozen: the other ends the run with a word, and doesn't hang.

    A step also has a collective, which waits as long as gloo does. Where the other one has come there, the
    frozen one goes on and is frozen again.
    """
    run = workers.make(**SERVER, parallel__rpc_timeout_s=2.0, trainer__max_steps=100000)
    log = run.path / "log.txt"
    pids = workers.start(run, 2)
    for _ in range(20):
        begun = run.step()
        until(lambda begun=begun: run.step() >= begun + 2, "two more steps")  # type: ignore[misc]
        os.kill(pids[rank], signal.SIGSTOP)
        with contextlib.suppress(AssertionError):
            until(lambda: said in log.read_text(), "the word", seconds=10)
            break
        os.kill(pids[rank], signal.SIGCONT)
    failed = workers.finish(run)
    assert failed.codes[1 - rank] == 1
    assert said in failed.log
