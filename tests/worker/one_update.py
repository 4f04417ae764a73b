"""A worker to which one thing happens that a recovery could do wrong, in the third of its steps: $WRONG names it.

What tests/chaos must see in the losses; see test_tolerance.py.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from hpcdl.runs.store import RunDir
from hpcdl.worker import main as worker
from hpcdl.worker.data.loader import Loader

AT = 3
_step = torch.optim.SGD.step
_micro_batches = Loader.micro_batches


def update_left_out(optimizer: Any, number: int) -> None:
    if number != AT:
        _step(optimizer)


def update_done_twice(optimizer: Any, number: int) -> None:
    for _ in range(2 if number == AT else 1):
        _step(optimizer)


def momentum_lost(optimizer: Any, number: int) -> None:
    if number == AT:
        optimizer.state.clear()
    _step(optimizer)


def batch_of_another_step(loader: Loader, step: int) -> Any:
    return _micro_batches(loader, step + 1 if step == AT else step)


def main(run: RunDir) -> None:
    wrong = globals()[os.environ["WRONG"]]
    if wrong is batch_of_another_step:
        Loader.micro_batches = wrong  # type: ignore[method-assign]
    else:
        count = iter(range(1, 1_000))
        torch.optim.SGD.step = lambda self, closure=None: wrong(self, next(count))  # type: ignore[method-assign]
    worker.main(run)
