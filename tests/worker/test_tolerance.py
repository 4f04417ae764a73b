"""What tests/chaos lets runs of other shapes differ by is far below what one step done wrong makes of the losses."""

from __future__ import annotations

import pytest

from tests.chaos.story import TOLERANCE
from tests.worker.conftest import Workers
from tests.worker.one_update import AT

pytestmark = pytest.mark.torch
CHAOS = {"optim__name": "sgd", "optim__lr": 1e-3, "trainer__max_steps": 12}


@pytest.fixture(scope="module")
def whole(workers: Workers) -> list[float]:
    """Losses of a run to which nothing happens."""
    return workers.train(1, **CHAOS).losses()


@pytest.mark.parametrize(
    "wrong", ["update_left_out", "update_done_twice", "momentum_lost", "batch_of_another_step"]
)
def test_one_step_done_wrong_is_seen(workers: Workers, whole: list[float], wrong: str) -> None:
    run = workers.make(**CHAOS)
    harmed = workers.go(run, module="tests.worker.one_update", env={"WRONG": wrong}).losses()
    off = [abs(a - b) / b for a, b in zip(harmed, whole, strict=True)]
    assert off[: AT - 1] == [0.0] * (AT - 1)
    assert max(off) > 25 * TOLERANCE, off


def test_another_shape_is_within_it(workers: Workers, whole: list[float]) -> None:
    two = workers.train(2, **CHAOS, parallel__name="fsdp").losses()
    assert two == pytest.approx(whole, rel=TOLERANCE / 10)
