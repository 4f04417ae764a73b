"""Batches built ahead by other processes are the batches that this process would build."""

from __future__ import annotations

import os
import re
import signal

import numpy as np
import psutil
import pytest
import torch

from hpcdl.errors import HpcdlError
from hpcdl.worker.data.batches import Order, batch, share
from hpcdl.worker.data.loader import Loader, Reading
from hpcdl.worker.data.pack import START, TARGET
from hpcdl.worker.data.prepare import Rows
from tests.worker.conftest import Workers, until

pytestmark = pytest.mark.torch
CPU = torch.device("cpu")
ROWS = 10
"""With 4 rows a step, the third step lies in two epochs."""


@pytest.fixture
def part() -> Rows:
    rng = np.random.default_rng(0)
    flags = np.full((ROWS, 9), TARGET, np.uint8)
    flags[:, [0, 5]] = START
    return Rows(
        rng.integers(0, 250, (ROWS, 9)).astype(np.uint16), flags, rng.integers(1, 9, (ROWS, 2), np.int64)
    )


def reading(rank: int = 0, ranks: int = 1, micro: int = 2) -> Reading:
    return Reading(seed=3, global_batch_size=4, micro_batch_size=micro, rank=rank, ranks=ranks, last_step=8)


def tokens(loader: Loader, steps: range) -> list[list[torch.Tensor]]:
    made = [[b["input_ids"] for b in loader.micro_batches(step)] for step in steps]
    loader.close()
    return made


def equal(a: list[list[torch.Tensor]], b: list[list[torch.Tensor]]) -> bool:
    return all(
        torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True)
    )


def test_steps_are_read_in_the_seeds_order(part: Rows) -> None:
    loader = Loader(part, reading(), CPU)
    order = Order(ROWS, 3)
    for step in range(1, 6):
        rows = order.rows((step - 1) * 4, 4)
        assert loader.counts(step) == tuple(part.counts[rows].sum(axis=0))
        for made, chosen in zip(loader.micro_batches(step), (rows[:2], rows[2:]), strict=True):
            expected = batch(part, chosen, CPU)
            assert made.keys() == expected.keys()
            assert all(torch.equal(made[name], expected[name]) for name in made)


@pytest.mark.parametrize("count", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(part: Rows, count: int) -> None:
    """Over two ends of an epoch, and from a step in the middle as a resumed run asks."""
    plain = tokens(Loader(part, reading(), CPU), range(1, 9))
    assert equal(plain, tokens(Loader(part, reading(), CPU, workers=count, prefetch=3), range(1, 9)))
    assert equal(plain[4:], tokens(Loader(part, reading(), CPU, workers=count), range(5, 9)))
    again = Loader(part, reading(), CPU, workers=count)
    assert equal(plain[6:7], [[b["input_ids"] for b in again.micro_batches(7)]])
    assert equal(plain[:2], tokens(again, range(1, 3)))  # a jump back


def test_ranks_share_each_step(part: Rows) -> None:
    whole = tokens(Loader(part, reading(micro=4), CPU), range(1, 9))
    halves = [tokens(Loader(part, reading(rank, 2), CPU, workers=1), range(1, 9)) for rank in (0, 1)]
    joined = [[torch.cat([first[0], second[0]])] for first, second in zip(*halves, strict=True)]
    assert equal(whole, joined)
    assert share(np.arange(4), 1, 2).tolist() == [2, 3]


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]


def test_closing_leaves_no_process(part: Rows) -> None:
    before = {p.pid for p in children()}
    loader = Loader(part, reading(), CPU, workers=2)
    loader.micro_batches(1)
    assert len({p.pid for p in children()} - before) == 2
    loader.close()
    assert {p.pid for p in children()} == before
    loader.close()


def test_workers_leave_signals_to_their_rank(part: Rows) -> None:
    """Slurm sends them to every process of a step; torch's own watch would call a dead worker an error."""
    before = {p.pid for p in children()}
    loader = Loader(part, reading(), CPU, workers=1, prefetch=1)
    loader.micro_batches(1)
    (pid,) = {p.pid for p in children()} - before
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        os.kill(pid, number)
    assert len(tokens(loader, range(2, 9))) == 7


class Process:
    """A worker, as multiprocessing tells of it."""

    def __init__(self, exitcode: int | None) -> None:
        self.pid, self.exitcode = 7, exitcode

    def join(self, timeout: float) -> None:
        assert timeout > 0


class Dying:
    """A DataLoader's iterator that fails."""

    def __init__(self, error: Exception, exitcode: int | None = -9) -> None:
        self.error, self._workers = error, [Process(exitcode)]

    def __next__(self) -> object:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        ConnectionResetError(104, "Connection reset by peer"),
        EOFError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_dead_worker_is_the_users_error(
    part: Rows, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Loader(part, reading(), CPU)
    loader.micro_batches(1)
    monkeypatch.setattr(loader, "_batches", Dying(error))
    with pytest.raises(HpcdlError, match=r"a process that loads data has died: .*pid 7.*data\.workers=0"):
        loader.micro_batches(2)


def test_an_error_with_its_workers_alive_stays_what_it_is(
    part: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Loader(part, reading(), CPU)
    loader.micro_batches(1)
    monkeypatch.setattr(loader, "_batches", Dying(OSError(5, "Input/output error"), exitcode=None))
    with pytest.raises(OSError, match="Input/output"):
        loader.micro_batches(2)


def test_training_with_workers_is_the_same(workers: Workers) -> None:
    plain = workers.train(1)
    ahead = workers.train(2, data__workers=1, data__prefetch=2)
    assert ahead.losses() == pytest.approx(plain.losses(), rel=1e-5)


def loader_of(rank: int) -> int | None:
    """The process that loads data for the rank with this pid, once it is there."""
    found = psutil.Process(rank).children()
    return found[0].pid if found else None


def test_a_killed_worker_ends_the_run(workers: Workers) -> None:
    run = workers.make(data__workers=1, trainer__max_steps=100_000)
    (rank,) = workers.start(run)
    until(lambda: run.step() >= 2, "the second step")
    pid = loader_of(rank)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    failed = workers.finish(run)
    assert failed.codes == [1]
    # torch learns of it from a signal or from a broken queue, whichever is first
    assert re.search(rf"DataLoader worker \(pid(\(s\))? {pid}\) (is killed|exited unexpectedly)", failed.log)


def test_workers_die_with_their_rank(workers: Workers) -> None:
    run = workers.make(data__workers=1, trainer__max_steps=100_000)
    (rank,) = workers.start(run)
    until(lambda: run.step() >= 2, "the second step")
    pid = loader_of(rank)
    assert pid is not None
    os.kill(rank, signal.SIGKILL)
    assert workers.finish(run).codes == [-signal.SIGKILL]
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", "the loader's end")
