"""A run's training from its data to its result: every part made, put together and driven, in that order."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from hpcdl.compress import offload
from hpcdl.distributed.engine import Engine
from hpcdl.distributed.mesh import Grid
from hpcdl.errors import UnsavedError
from hpcdl.runs.files import unwritten, write_json
from hpcdl.runs.store import RunDir, now
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.checkpoint import Found, Totals
from hpcdl.spec.parallel import ParallelDims
from hpcdl.worker import (
    communication,
    control,
    loop,
    metrics,
    model,
    network,
    pruning,
    result,
    resume,
    rng,
    streamed,
    tasks,
    trackers,
    waiting,
)
from hpcdl.worker.checkpoint import Checkpointer
from hpcdl.worker.data.loader import Loader, Reading
from hpcdl.worker.data.prepare import Dataset, Rows, open_dataset
from hpcdl.worker.heartbeat import Progress
from hpcdl.worker.keeping import Keeper
from hpcdl.worker.memory import Meter, note_end
from hpcdl.worker.process import Process, bf16_is_slow
from hpcdl.worker.signals import Stop
from hpcdl.worker.tokenizer import Tokenizer


class Text(Protocol):
    """What is trained on."""

    @property
    def train(self) -> Rows | None:
        """Training rows, where a model is to be pruned by text, or rounded."""
        ...

    @property
    def digest(self) -> str:
        """Names the content."""
        ...


D = TypeVar("D", bound=Text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready(Generic[D]):
    """What is there when the first step can begin."""

    place: str | None
    """Where the base weights came from; None: random."""
    tokenizer: Tokenizer
    data: D
    grid: Grid
    net: network.Network
    """The whole model; taken apart by strategies that leave each rank a part."""
    size: network.Size
    engine: Engine
    lesson: tasks.Lesson | None
    """What the task does to the loss."""
    saver: Checkpointer
    found: Found | None
    """The checkpoint that this try goes on from."""
    first_step: int
    """The step that the run began with: 0, or that of another run's checkpoint."""
    totals: Totals


def train(
    spec: ExperimentSpec, run: RunDir, who: Process, device: torch.device, stop: Stop, progress: Progress
) -> None:
    """Trains until the last step or the order to stop; the first rank leaves the result and the outcome."""
    ready = prepare(spec, run, who, device, open_dataset)
    progress.begin(ready.totals.step)
    lines = metrics.Metrics(run, active=who.is_first)
    if who.is_first:
        announce(spec, run, who, ready)
        ready.saver.clean()
        lines.rewind(ready.totals.step)
    tracker = trackers.start(spec, run, active=who.is_first)
    mfu_of = network.seconds_at_peak(spec, ready.size, device, who.world_size)
    reason = drive(spec, run, who, ready, lines, stop, progress, mfu_of)
    progress.end()
    if who.is_first and reason is None:
        finish(spec, run, who, ready, lines, mfu_of)
    note_end(run, who, device)
    if who.is_first:
        write_outcome(run, who, ready.totals.step, reason)
        # Whoever stops a job gives it seconds; what the tracker lacks then is sent by the next try.
        tracker.finish(trackers.FINISH_S if reason is None else trackers.STOPPED_S)


def prepare(
    spec: ExperimentSpec,
    run: RunDir,
    who: Process,
    device: torch.device,
    read: Callable[[ExperimentSpec, Tokenizer], D],
) -> Ready[D]:
    """Data, model, strategy and the state to go on from; the same steps on every rank.

    Args:
        spec: the experiment.
        run: the run.
        who: this rank.
        device: its device.
        read: gives what is trained on.
    """
    grid = Grid(ParallelDims.fill(spec.parallel, who.world_size), device)
    place = model.weights_place(spec.model)
    tokenizer = model.tokenizer_for(spec.model, place)
    data = read(spec, tokenizer)
    begun = time.perf_counter()
    model.import_library()
    started = time.perf_counter()
    if offload.streams(spec):
        net: network.Network = streamed.prepare(spec, place, run.path, device)
    else:
        net = network.prepare(spec, model.load(spec, place), device, data.train)
    if who.is_first:
        imports_s = round(started - begun, 3)
        run.event("loaded", seconds=round(time.perf_counter() - started, 3), imports_s=imports_s)
    size = network.size_of(net.model)
    weights = control.fingerprint(net.trainable() if who.world_size > 1 else ())
    keeper = Keeper(run, who, spec.trainer)
    found = resume.choose(run, who, keeper, weights, device, spec.trainer.resume_from)
    first_step = resume.first_step(run, found)
    if grid.dims.world_size == grid.dims.dp_replicate:  # else a part of it will be enough for the device
        net.to_device()
    if who.is_first and found is None:
        result.sample_before(spec, run, net, tokenizer)
    engine = network.parallelize(spec, net, grid)
    lesson = tasks.attach(spec, engine)
    saver = Checkpointer(run, who, engine, spec, keeper, data_digest=data.digest, first_step=first_step)
    rng.seed_all(spec.seed, who.rank)
    totals = resume.totals_from(run, found)
    if found is not None:
        saver.load(found)
    return Ready(
        place=place, tokenizer=tokenizer, data=data, grid=grid, net=net, size=size, engine=engine,
        lesson=lesson, saver=saver, found=found, first_step=first_step, totals=totals,
    )  # fmt: skip


def announce(spec: ExperimentSpec, run: RunDir, who: Process, ready: Ready[Any]) -> None:
    """Events that only the workers know of: a restart in place by torchrun, a resume, what will be slow."""
    if who.restart:
        run.event("restarted", restart=who.restart)
    if ready.found is not None:
        run.event("resumed", step=ready.found.step, **{"from": str(ready.found.path)})
    device = ready.net.device
    if ready.net.autocast and bf16_is_slow(device):
        run.event("warning", message="this CPU has no bf16 instructions: trainer.precision=fp32 is quicker")
    if device.type == "cpu" and (spec.cluster.gres or "").startswith("gpu"):
        run.event(
            "warning", message=f"gres {spec.cluster.gres} gave no GPU that torch sees: training on the CPU"
        )


def drive(
    spec: ExperimentSpec,
    run: RunDir,
    who: Process,
    ready: Ready[Dataset],
    lines: metrics.Metrics,
    stop: Stop,
    progress: Progress,
    mfu_of: float | None,
) -> str | None:
    """The loop over the batches that are left; why it was left before its last step, or None."""
    data_rank, data_ranks = ready.grid.data_place
    reading = Reading(
        seed=spec.seed, global_batch_size=spec.trainer.global_batch_size,
        micro_batch_size=spec.trainer.micro_batch_size, rank=data_rank, ranks=data_ranks,
        last_step=spec.trainer.max_steps,
    )  # fmt: skip
    workers, prefetch = spec.data.workers, spec.data.prefetch
    loader = Loader(ready.data.train, reading, ready.net.device, workers=workers, prefetch=prefetch)
    meter = None if spec.monitor.name == "none" else Meter(spec, run, who, ready.engine)
    lookout = waiting.Lookout(
        run, who, ready.engine.device, spec.monitor, work=ready.engine.work, lag=ready.engine.lag
    )
    taking_out = pruning.gradual(spec, run if who.is_first else None, ready.net, ready.data.train)
    reason = loop.run(
        loop.Parts(
            spec=spec, run=run, who=who, engine=ready.engine, data=ready.data, loader=loader,
            data_rank=data_rank, data_ranks=data_ranks, checkpointer=ready.saver, first_step=ready.first_step,
            metrics=lines, stop=stop, progress=progress, lesson=ready.lesson, meter=meter,
            pruning=taking_out, lookout=lookout,
            mfu_of=mfu_of,
        ),
        ready.totals,
    )  # fmt: skip
    lookout.close()
    loader.close()
    ready.engine.close()
    return reason


def finish(
    spec: ExperimentSpec,
    run: RunDir,
    who: Process,
    ready: Ready[Dataset],
    lines: metrics.Metrics,
    mfu_of: float | None,
) -> None:
    """Saves the result."""
    net, totals = ready.net, ready.totals
    if not ready.engine.is_whole:
        path = ready.saver.path_of(totals.step)
        net = network.from_checkpoint(spec, ready.place, path, net.device, ready.data.train)
    cost = communication.summary(run.metrics(), spec.trainer.max_steps, ready.engine.period)
    result.save(
        result.Finished(
            spec=spec, run=run, who=who, net=net, size=ready.size, tokenizer=ready.tokenizer, metrics=lines,
            totals=totals, place=ready.place, mfu_of=mfu_of, text=ready.data.train,
            measured={**ready.engine.report(), **cost},
        )
    )  # fmt: skip


def write_outcome(run: RunDir, who: Process, step: int, reason: str | None) -> None:
    """Tells the agent how the loop ended: the last that rank 0 has to do.

    Raises:
        UnsavedError: lines of metrics or events still find no room.
    """
    for file in (run.metrics_file, run.events_file):
        if count := unwritten(file):
            raise UnsavedError(
                f"{count} lines of {file.name} can't be written to {run.path}: the disk is full; make room, and"
                " launch again"
            )
    outcome = {
        "try": who.attempt,
        "status": "finished" if reason is None else "stopped",
        "reason": reason or "",
        "step": step,
        "time": now(),
    }
    write_json(run.outcome_file, outcome)
