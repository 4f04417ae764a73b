"""The training loop: steps, evaluation, metrics, checkpoints, and stopping when asked."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from hpcdl.errors import HpcdlError
from hpcdl.runs.store import RunDir
from hpcdl.spec import ExperimentSpec
from hpcdl.worker.checkpoint import Checkpointer, Totals
from hpcdl.worker.control import gather
from hpcdl.worker.data.batches import Order, batch, share
from hpcdl.worker.data.prepare import Dataset
from hpcdl.worker.errors import Progress
from hpcdl.worker.evaluate import heldout_loss
from hpcdl.worker.metrics import Metrics, evaluation, peak_memory_bytes
from hpcdl.worker.network import Network
from hpcdl.worker.optim import learning_rate
from hpcdl.worker.process import Process
from hpcdl.worker.signals import Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """All that the loop works with."""

    spec: ExperimentSpec
    run: RunDir
    who: Process
    net: Network
    optimizer: torch.optim.Optimizer
    data: Dataset
    data_rank: int
    """This rank among those that read different samples."""
    data_ranks: int
    """How many those are."""
    checkpointer: Checkpointer
    metrics: Metrics
    stop: Stop
    progress: Progress
    mfu_of: float | None
    """Seconds that a token would take at the devices' peak, over all ranks; None where that isn't known."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one step measured; the same on every rank."""

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


@dataclass(slots=True)
class Stopwatch:
    """Seconds and tokens since the last logged step; evaluation and checkpoints stand outside."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """A step begins."""
        self.started = time.perf_counter()

    def stop(self, tokens: int) -> float:
        """A step is over; returns its seconds."""
        took = time.perf_counter() - self.started
        self.steps, self.seconds, self.tokens = self.steps + 1, self.seconds + took, self.tokens + tokens
        return took

    def read(self, mfu_of: float | None) -> dict[str, Any]:
        """The averages since the last reading, which starts anew."""
        speed = self.tokens / self.seconds
        values = {
            "tokens_per_s": round(speed, 2),
            "step_s": round(self.seconds / self.steps, 6),
            "mfu": None if mfu_of is None else round(speed * mfu_of, 4),
        }
        self.steps, self.seconds, self.tokens = 0, 0.0, 0
        return values


def run(parts: Parts, totals: Totals) -> str | None:
    """Trains from `totals.step` to the last step, or until asked to stop.

    Evaluates at the top of the loop, after the checkpoint of the same step: a run resumed from it evaluates
    again and goes on as if nothing had happened.

    Returns:
        Why it was stopped; None where it ran to its end.
    """
    trainer = parts.spec.trainer
    order = Order(len(parts.data.train), parts.spec.seed)
    watch = Stopwatch()
    parts.net.wrapped.train()
    while True:
        if _evaluation_due(parts.spec, totals.step):
            _evaluate(parts, totals.step)
        if totals.step == trainer.max_steps:
            return None
        watch.start()
        outcome = train_step(parts, order, totals.step + 1)
        totals.step += 1
        totals.train_s += watch.stop(outcome.tokens)
        totals.tokens += outcome.tokens
        totals.peak_memory_bytes = max(totals.peak_memory_bytes, outcome.peak_memory_bytes)
        parts.progress.step = totals.step
        stopping = outcome.stop is not None and totals.step < trainer.max_steps
        last = stopping or totals.step == trainer.max_steps
        if last or totals.step % trainer.log_every == 0:
            _log(parts, totals, outcome, watch)
        if stopping and parts.who.is_first:
            parts.run.event("stopping", reason=outcome.stop, step=totals.step)
        if last or (trainer.checkpoint_every and totals.step % trainer.checkpoint_every == 0):
            parts.checkpointer.save(totals)
        if stopping:
            return outcome.stop


def train_step(parts: Parts, order: Order, step: int) -> StepOutcome:
    """One optimizer step over the global batch of `step`, which counts from 1.

    The gradient is that of the mean over all target tokens of the global batch: every rank knows their
    number from the data's own counts, so no collective is needed before the backward pass.

    Raises:
        HpcdlError: the loss is no number any more.
    """
    spec, net = parts.spec, parts.net
    size = spec.trainer.global_batch_size
    rows = order.rows((step - 1) * size, size)
    targets, tokens = (int(n) for n in parts.data.train.counts[rows].sum(axis=0))
    mine = share(rows, parts.data_rank, parts.data_ranks)
    micro = spec.trainer.micro_batch_size
    lr = learning_rate(spec.optim, step, spec.trainer.max_steps)
    for group in parts.optimizer.param_groups:
        group["lr"] = lr
    # The strategy averages gradients over data ranks; the mean over tokens wants their sum.
    scale = parts.data_ranks / targets
    total = torch.zeros((), dtype=torch.float64, device=net.device)
    for at in range(0, len(mine), micro):
        with net.accumulating(last=at + micro >= len(mine)):
            with net.context():
                loss = net.wrapped(**batch(parts.data.train, mine[at : at + micro], net.device))
            (loss * scale).backward()
        total += loss.detach()
    norm = clip_grad_norm_(net.trainable(), spec.trainer.max_grad_norm or math.inf)
    parts.optimizer.step()
    parts.optimizer.zero_grad(set_to_none=True)
    everyone = gather([total, norm, peak_memory_bytes(net.device), *parts.stop.flags()], net.device)
    copies = parts.who.world_size // parts.data_ranks
    mean = math.fsum(everyone[:, 0].tolist()) / copies / targets
    if not math.isfinite(mean):
        raise HpcdlError(f"the loss is {mean} at step {step}: lower optim.lr, or longer optim.warmup_steps")
    return StepOutcome(
        loss=mean,
        grad_norm=float(everyone[0, 1]),
        lr=lr,
        tokens=tokens,
        peak_memory_bytes=int(everyone[:, 2].max()),
        stop=parts.stop.reason(everyone[:, 3:].sum(dim=0).tolist()),
    )


def _evaluation_due(spec: ExperimentSpec, step: int) -> bool:
    every = spec.trainer.eval_every
    return step in (0, spec.trainer.max_steps) or bool(every and step % every == 0)


def _evaluate(parts: Parts, step: int) -> None:
    loss = heldout_loss(parts.spec, parts.net, parts.data.heldout, parts.data_rank, parts.data_ranks)
    parts.metrics.write(evaluation(step, loss))


def _log(parts: Parts, totals: Totals, outcome: StepOutcome, watch: Stopwatch) -> None:
    measured = watch.read(parts.mfu_of)
    parts.metrics.write(
        {
            "step": totals.step,
            "loss": outcome.loss,
            "grad_norm": outcome.grad_norm,
            "lr": outcome.lr,
            "tokens": totals.tokens,
            **measured,
            "peak_memory_bytes": outcome.peak_memory_bytes,
        }
    )
