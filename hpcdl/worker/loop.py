"""The training loop: steps, evaluation, metrics, checkpoints, and stopping when asked."""

from __future__ import annotations

import math
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from hpcdl.distributed.engine import Engine
from hpcdl.errors import HpcdlError
from hpcdl.runs.store import RunDir
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.checkpoint import Totals
from hpcdl.worker import communication, tasks
from hpcdl.worker.checkpoint import Checkpointer
from hpcdl.worker.control import Gathering
from hpcdl.worker.data.loader import Loader
from hpcdl.worker.data.prepare import Dataset
from hpcdl.worker.evaluate import heldout_loss
from hpcdl.worker.heartbeat import Progress
from hpcdl.worker.memory import Meter, step_to_measure
from hpcdl.worker.metrics import Metrics, evaluation, peak_memory_bytes
from hpcdl.worker.optim import learning_rate
from hpcdl.worker.process import Process
from hpcdl.worker.pruning import Gradual
from hpcdl.worker.signals import Stop
from hpcdl.worker.waiting import Lookout


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """All that the loop works with."""

    spec: ExperimentSpec
    run: RunDir
    who: Process
    engine: Engine
    data: Dataset
    loader: Loader
    """This rank's micro-batches of the training rows."""
    data_rank: int
    """This rank among those that read different samples."""
    data_ranks: int
    """How many those are."""
    checkpointer: Checkpointer
    first_step: int
    """The step that the run began from: above 0 where it continues another run."""
    metrics: Metrics
    stop: Stop
    progress: Progress
    lookout: Lookout
    """Looks at some steps, for whom the others wait."""
    pruning: Gradual | None
    """What takes weights out while training goes on."""
    lesson: tasks.Lesson | None
    """What the task does to the loss, where it isn't the text's cross-entropy."""
    meter: Meter | None = None
    """Tells in one step where memory goes; None: nobody wants to know."""
    mfu_of: float | None
    """Seconds that a token would take at the devices' peak, over all ranks; None where that isn't known."""


@dataclass(frozen=True, slots=True)
class Under:
    """A step that this rank has done, while the others' numbers are still to come."""

    step: int
    targets: int
    """Target tokens of the global batch."""
    tokens: int
    """Input tokens of the global batch, without padding."""
    lr: float
    numbers: Gathering


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one step measured; the same on every rank."""

    step: int
    loss: float
    """Mean over the global batch's target tokens."""
    grad_norm: float
    """Before clipping."""
    lr: float
    tokens: int
    """Input tokens without padding."""
    peak_memory_bytes: int
    """Highest of any rank so far in this try."""
    stop: str | None
    """Why to stop after this step."""
    parts: dict[str, float]
    """What the task measures besides the loss: means over the same tokens."""


@dataclass(slots=True)
class Stopwatch:
    """Seconds and tokens since the last logged step; evaluation and checkpoints stand outside."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)
    last: dict[str, Any] = field(default_factory=dict)
    profiled: tuple[float, int] | None = None
    """Seconds and tokens of a profiled step, which counts only where there is no other."""

    def start(self) -> None:
        """A step begins."""
        self.started = time.perf_counter()

    def stop(self, tokens: int, *, profiled: bool = False) -> float:
        """A step is over; returns its seconds."""
        took = time.perf_counter() - self.started
        if profiled:
            self.profiled = took, tokens
        else:
            self.steps, self.seconds, self.tokens = self.steps + 1, self.seconds + took, self.tokens + tokens
        return took

    def read(self, mfu_of: float | None) -> dict[str, Any]:
        """The averages since the last reading, which starts anew; the last ones where no step was done since.

        `profiled` is among them where they are a profiled step's own.
        """
        more: dict[str, Any] = {}
        if not self.steps and self.profiled is not None:
            self.steps, self.seconds, self.tokens = 1, *self.profiled
            more = {"profiled": True}
        if not self.steps:
            return self.last
        speed = self.tokens / self.seconds
        self.last = {
            "tokens_per_s": round(speed, 2),
            "step_s": round(self.seconds / self.steps, 6),
            "mfu": None if mfu_of is None else round(speed * mfu_of, 4),
            **more,
        }
        self.steps, self.seconds, self.tokens, self.profiled = 0, 0.0, 0, None
        return self.last


def run(parts: Parts, totals: Totals) -> str | None:
    """Trains from `totals.step` to the last step, or until asked to stop.

    Evaluates at the top of the loop, after the checkpoint of the same step: a run resumed from it evaluates
    again and goes on as if nothing had happened.

    Returns:
        Why it was stopped; None where it ran to its end.
    """
    trainer = parts.spec.trainer
    watch = Stopwatch()
    under: deque[Under] = deque()
    costs: dict[int, Gathering] = {}
    first = totals.step + 1
    profile = communication.chosen_steps(first, trainer.max_steps, parts.spec.monitor, parts.engine.period)
    weighed = step_to_measure(first, trainer.max_steps, profile) if parts.meter else None
    parts.lookout.start(max(first, weighed or 0, *profile, 0) + 1)
    parts.engine.stages.train()
    while True:
        if _evaluation_due(parts, totals.step):
            _evaluate(parts, totals.step)
        if totals.step == trainer.max_steps:
            return None
        step = totals.step + 1
        profiled = None
        if step in profile:
            warm = step >= first + communication.WARM_UP
            profiled = communication.Measurement(parts.engine.device, warm=warm)
        meter = parts.meter if step == weighed else None
        with profiled or (meter.during() if meter else nullcontext()):
            parts.lookout.begin(step)
            watch.start()
            under.append(train_step(parts, step))
            totals.step = step
            parts.progress.reach(step)
            # Of the step that takes this time, though the others may report theirs later.
            tokens = under[-1].tokens
            outcomes = _reached(parts, under, step)
            # Where ranks meet every few steps, the measured steps are no others' like: they count too.
            apart = (profiled is not None or meter is not None) and parts.engine.period == 1
            took = watch.stop(tokens, profiled=apart)
            parts.lookout.end(step)
        totals.add_time(took, tokens, profiled=apart)
        if meter is not None:
            meter.report(step)
        if profiled is not None:
            costs[step] = Gathering(profiled.cost.numbers(), parts.engine.device)
        stop = next((outcome.stop for outcome in outcomes if outcome.stop), None)
        stopping = stop is not None and totals.step < trainer.max_steps
        last = stopping or totals.step == trainer.max_steps
        for outcome in outcomes:
            totals.tokens += outcome.tokens
            totals.peak_memory_bytes = max(totals.peak_memory_bytes, outcome.peak_memory_bytes)
            if outcome.step % trainer.log_every == 0 or (last and outcome.step == totals.step):
                _log(parts, totals, outcome, watch)
            parts.lookout.reached(outcome.step)
            if outcome.step in costs:
                parts.metrics.write(communication.line(outcome.step, costs.pop(outcome.step).wait()))
        if stopping and parts.who.is_first:
            parts.run.event("stopping", reason=stop, step=totals.step)
        if last or _checkpoint_due(parts.spec, totals.step):
            with parts.progress.during("checkpoint"):
                parts.checkpointer.save(totals, wait=last)
        if stopping:
            return stop


def _reached(parts: Parts, under: deque[Under], step: int) -> list[StepOutcome]:
    """The steps that every rank has done by now, in order; taken out of `under`.

    A synchronous engine's ranks are always together. Others run ahead of one another by up to `lag` steps,
    but for those after which something is written: a checkpoint and an evaluation are of one step.
    """
    trainer = parts.spec.trainer
    together = step == trainer.max_steps or _checkpoint_due(parts.spec, step) or _evaluation_due(parts, step)
    outcomes: list[StepOutcome] = []
    while under and (together or len(under) > parts.engine.lag):
        outcomes.append(_outcome(parts, under.popleft()))
        together = together or outcomes[-1].stop is not None
    return outcomes


def train_step(parts: Parts, step: int) -> Under:
    """One optimizer step over the global batch of `step`, which counts from 1.

    The gradient is that of the mean over all target tokens of the global batch: every rank knows their
    number from the data's own counts, so no collective is needed before the backward pass.
    """
    spec, engine = parts.spec, parts.engine
    targets, tokens = parts.loader.counts(step)
    lr = learning_rate(spec.optim, step, spec.trainer.max_steps)
    with parts.lookout.loading():
        batches = parts.loader.micro_batches(step)
    total = engine.accumulate(batches, targets)
    parts.checkpointer.settle()  # what is being saved must be copied before it changes
    norm = engine.step(lr, spec.trainer.max_grad_norm)
    if parts.pruning is not None:
        parts.pruning.after(step, engine.optimizer)
    own = [] if parts.lesson is None else list(parts.lesson.measured())
    numbers = Gathering(
        [total, norm, peak_memory_bytes(engine.device), *parts.stop.flags(), *own], engine.device
    )
    return Under(step, targets, tokens, lr, numbers)


def _outcome(parts: Parts, under: Under) -> StepOutcome:
    """Waits for all ranks' numbers of a step.

    Raises:
        HpcdlError: the loss is no number any more.
    """
    everyone = under.numbers.wait()
    mean = math.fsum(everyone[:, 0].tolist()) / under.targets
    if not math.isfinite(mean):
        raise HpcdlError(
            f"the loss is {mean} at step {under.step}: lower optim.lr, or longer optim.warmup_steps"
        )
    names = () if parts.lesson is None else parts.lesson.names
    own = everyone[:, 3 + Stop.WIDTH :].T.tolist()
    return StepOutcome(
        step=under.step,
        loss=mean,
        grad_norm=parts.engine.norm_of(everyone[:, 1]),
        lr=under.lr,
        tokens=under.tokens,
        peak_memory_bytes=int(everyone[:, 2].max()),
        stop=parts.stop.reason(everyone[:, 3 : 3 + Stop.WIDTH].sum(dim=0).tolist()),
        parts={name: math.fsum(sums) / under.targets for name, sums in zip(names, own, strict=True)},
    )


def _checkpoint_due(spec: ExperimentSpec, step: int) -> bool:
    every = spec.trainer.checkpoint_every
    return bool(every and step % every == 0)


def _evaluation_due(parts: Parts, step: int) -> bool:
    every, last = parts.spec.trainer.eval_every, parts.spec.trainer.max_steps
    return step in (parts.first_step, last) or bool(every and step % every == 0)


def _evaluate(parts: Parts, step: int) -> None:
    with parts.progress.during("evaluation"):
        loss = heldout_loss(parts.spec, parts.engine, parts.data.heldout, parts.data_rank, parts.data_ranks)
    parts.metrics.write(evaluation(step, loss))
    parts.checkpointer.note(step, loss)


def _log(parts: Parts, totals: Totals, outcome: StepOutcome, watch: Stopwatch) -> None:
    measured = watch.read(parts.mfu_of)
    parts.metrics.write(
        {
            "step": outcome.step,
            "loss": outcome.loss,
            **outcome.parts,
            "grad_norm": outcome.grad_norm,
            "lr": outcome.lr,
            "tokens": totals.tokens,
            **measured,
            "peak_memory_bytes": outcome.peak_memory_bytes,
            **parts.engine.report(),
        }
    )
