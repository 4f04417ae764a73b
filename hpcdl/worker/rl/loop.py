"""Iterations of policy gradients: samples, updates, evaluations, metrics, checkpoints; stops when asked.

What is learned is a Learner's business: an environment's (playing.py) or a language model's (answering.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hpcdl.distributed.engine import Engine
from hpcdl.errors import HpcdlError
from hpcdl.runs.store import RunDir
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.checkpoint import Totals
from hpcdl.worker.checkpoint import Checkpointer
from hpcdl.worker.control import gather
from hpcdl.worker.heartbeat import Progress
from hpcdl.worker.metrics import Metrics, peak_memory_bytes
from hpcdl.worker.optim import learning_rate
from hpcdl.worker.process import Process
from hpcdl.worker.signals import Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """What one iteration measured; the same on every rank."""

    measured: Mapping[str, float]
    """For metrics.jsonl, `loss` among it."""
    count: int
    """Steps in environments, or tokens read and written, over all ranks."""
    sampling_s: float
    """Seconds that taking the samples has taken."""


class Learner(Protocol):
    """Takes samples and learns from them. Methods are called by all ranks together."""

    engine: Engine
    counts: str
    """What `Iteration.count` counts, as metrics.jsonl calls it."""

    def iterate(self, iteration: int, learning_rate: float, settle: Callable[[], None]) -> Iteration:
        """One iteration, which counts from 1; `settle` is called before the first weight changes."""
        ...

    def evaluate(self) -> dict[str, float]:
        """The policy without chance on what it isn't trained on, `eval_…`; the same on every rank."""
        ...

    def worth(self, evaluated: Mapping[str, float]) -> float:
        """One number of an evaluation: the higher, the better."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """All that the loop works with."""

    spec: ExperimentSpec
    run: RunDir
    who: Process
    learner: Learner
    saver: Checkpointer
    metrics: Metrics
    stop: Stop
    progress: Progress
    first_step: int
    """The step that the run began from: above 0 where it continues another run."""


def run(parts: Parts, totals: Totals) -> str | None:
    """Iterates from `totals.step` to the last step, or until asked to stop.

    Returns:
        Why it was stopped; None where it ran to its end.
    """
    trainer, learner = parts.spec.trainer, parts.learner
    while True:
        if _evaluation_due(parts, totals.step):
            _evaluate(parts, totals.step)
        if totals.step == trainer.max_steps:
            return None
        step, started = totals.step + 1, time.perf_counter()
        rate = learning_rate(parts.spec.optim, step, trainer.max_steps)
        done = learner.iterate(step, rate, parts.saver.settle)
        everyone = gather(
            [peak_memory_bytes(learner.engine.device), *parts.stop.flags()], learner.engine.device
        )
        took = time.perf_counter() - started
        _must_be_numbers(done, step)
        totals.step, totals.tokens = step, totals.tokens + done.count
        totals.peak_memory_bytes = max(totals.peak_memory_bytes, int(everyone[:, 0].max()))
        totals.add_time(took, done.count, profiled=False)
        parts.progress.reach(step)
        stop = parts.stop.reason(everyone[:, 1:].sum(dim=0).tolist())
        stopping = stop is not None and step < trainer.max_steps
        last = stopping or step == trainer.max_steps
        if step % trainer.log_every == 0 or last:
            _log(parts, totals, done, rate, took)
        if stopping and parts.who.is_first:
            parts.run.event("stopping", reason=stop, step=step)
        every = trainer.checkpoint_every
        if last or (every and step % every == 0):
            with parts.progress.during("checkpoint"):
                parts.saver.save(totals, wait=last)
        if stopping:
            return stop


def _must_be_numbers(done: Iteration, step: int) -> None:
    """Raises where the loss is none any more."""
    if not math.isfinite(done.measured["loss"]):
        raise HpcdlError(f"the loss is {done.measured['loss']} at step {step}: lower optim.lr")


def _evaluation_due(parts: Parts, step: int) -> bool:
    every, last = parts.spec.trainer.eval_every, parts.spec.trainer.max_steps
    return step in (parts.first_step, last) or bool(every and step % every == 0)


def _evaluate(parts: Parts, step: int) -> None:
    with parts.progress.during("evaluation"), torch.no_grad():
        found = parts.learner.evaluate()
    parts.metrics.write({"step": step, **found})
    parts.saver.note(step, -parts.learner.worth(found))


def _log(parts: Parts, totals: Totals, done: Iteration, rate: float, took: float) -> None:
    counts = parts.learner.counts
    line: dict[str, Any] = {
        "step": totals.step,
        **done.measured,
        "lr": rate,
        counts: totals.tokens,
        f"{counts}_per_s": round(done.count / took, 2),
        "step_s": round(took, 6),
        "sampling_s": round(done.sampling_s, 6),
        "peak_memory_bytes": totals.peak_memory_bytes,
    }
    parts.metrics.write(line)
