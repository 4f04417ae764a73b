"""The worker's entry: `python -m hpcdl.worker.main RUN_DIR`, started by torchrun once a process.

Only the standard library and hpcdl's light modules are imported before the signal handlers stand: what
takes seconds (torch, transformers, peft) comes after, and only what the experiment uses.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hpcdl.compress import quant
from hpcdl.runs.files import write_json
from hpcdl.runs.store import RunDir, now
from hpcdl.spec.checkpoint import Found
from hpcdl.worker import errors, monitor, process
from hpcdl.worker.process import Process
from hpcdl.worker.signals import Stop
from hpcdl.worker.spec import read_spec


def main(run: RunDir) -> None:
    """Trains the run's experiment; leaves the process group only after everyone has come to the end."""
    who = process.from_environment()
    progress = errors.Progress()
    process.die_with_parent()
    stop = Stop(run, watch_file=who.is_first)
    try:
        with monitor.watch(read_spec(run.spec_file).monitor, run, who):
            train(run, who, stop, progress)
        process.leave()
    except BaseException as error:
        try:
            errors.report(run, who, progress.step, error)
        finally:
            os._exit(1)  # at once: a tidy exit would wait for ranks that wait for this one


def train(run: RunDir, who: Process, stop: Stop, progress: errors.Progress) -> None:
    """The order of things, from spec.yaml to the outcome."""
    spec = read_spec(run.spec_file)
    quant.hide_unused(spec.quant.scheme)
    device = process.choose_device(spec, who)
    threads = process.set_threads(spec, who, device)
    process.join(who, device)
    print(f"{who.node}: rank {who.rank} of {who.world_size}, {device}, {threads.describe()}", flush=True)
    if threads.warning:
        print(f"{who.node}: rank {who.rank}: {threads.warning}", flush=True)
        if who.local_rank == 0:
            run.event("warning", message=f"{who.node}: {threads.warning}")

    from hpcdl.distributed.mesh import Grid
    from hpcdl.spec.parallel import ParallelDims
    from hpcdl.worker import (
        checkpoint,
        communication,
        control,
        loop,
        metrics,
        model,
        network,
        result,
        resume,
        rng,
        trackers,
    )
    from hpcdl.worker.data.loader import Loader, Reading
    from hpcdl.worker.data.prepare import open_dataset

    grid = Grid(ParallelDims.fill(spec.parallel, who.world_size), device)
    data_rank, data_ranks = grid.data_place
    place = model.weights_place(spec.model)
    tokenizer = model.tokenizer_for(spec.model, place)
    data = open_dataset(spec, tokenizer)
    net = network.prepare(spec, model.load(spec, place), device)
    size = network.size_of(net.model)
    found = resume.choose(run, who, control.fingerprint(net.trainable()), device, spec.trainer.resume_from)
    first_step = resume.first_step(run, found)
    if grid.dims.world_size == grid.dims.dp_replicate:  # else a part of it will be enough for the device
        net.model.to(device)
    if who.is_first and found is None:
        result.sample_before(spec, run, net, tokenizer)
    engine = network.parallelize(spec, net, grid)
    saver = checkpoint.Checkpointer(run, who, engine, spec, data_digest=data.digest, first_step=first_step)
    rng.seed_all(spec.seed, who.rank)
    totals = resume.totals_from(run, found)
    if found is not None:
        saver.load(found)
    progress.step = totals.step

    tracker = trackers.start(spec, run, who.attempt, active=who.is_first)
    lines = metrics.Metrics(run, tracker, active=who.is_first)
    if who.is_first:
        announce(run, who, found)
        if net.autocast and process.bf16_is_slow(device):
            run.event(
                "warning", message="this CPU has no bf16 instructions: trainer.precision=fp32 is quicker"
            )
        if device.type == "cpu" and (spec.cluster.gres or "").startswith("gpu"):
            run.event(
                "warning",
                message=f"gres {spec.cluster.gres} gave no GPU that torch sees: training on the CPU",
            )
        saver.clean()
        lines.rewind(totals.step)
    reading = Reading(
        seed=spec.seed, global_batch_size=spec.trainer.global_batch_size,
        micro_batch_size=spec.trainer.micro_batch_size, rank=data_rank, ranks=data_ranks,
        last_step=spec.trainer.max_steps,
    )  # fmt: skip
    loader = Loader(data.train, reading, device, workers=spec.data.workers, prefetch=spec.data.prefetch)
    mfu_of = network.seconds_at_peak(spec, size, device, who.world_size)
    reason = loop.run(
        loop.Parts(
            spec=spec, run=run, who=who, engine=engine, data=data, loader=loader, data_rank=data_rank,
            data_ranks=data_ranks, checkpointer=saver, first_step=first_step, metrics=lines, stop=stop,
            progress=progress, mfu_of=mfu_of,
        ),
        totals,
    )  # fmt: skip
    loader.close()
    engine.close()
    if who.is_first:
        summary = {}
        if reason is None:
            if not engine.is_whole:
                net = network.from_checkpoint(spec, place, saver.path_of(totals.step), device)
            cost = communication.summary(run.metrics(), spec.trainer.max_steps, engine.period)
            summary = result.save(
                result.Finished(
                    spec=spec, run=run, who=who, net=net, size=size, tokenizer=tokenizer, metrics=lines,
                    totals=totals, place=place, mfu_of=mfu_of, measured={**engine.report(), **cost},
                )
            )  # fmt: skip
        tracker.finish(summary)
        write_outcome(run, who, totals.step, reason)


def announce(run: RunDir, who: Process, found: Found | None) -> None:
    """Events that only the workers know of: a restart in place by torchrun, a resume."""
    if who.restart:
        run.event("restarted", restart=who.restart)
    if found is not None:
        run.event("resumed", step=found.step, **{"from": str(found.path)})


def write_outcome(run: RunDir, who: Process, step: int, reason: str | None) -> None:
    """Tells the agent how the loop ended: rank 0's last act."""
    outcome = {
        "try": who.attempt,
        "status": "finished" if reason is None else "stopped",
        "reason": reason or "",
        "step": step,
        "time": now(),
    }
    write_json(run.outcome_file, outcome)


if __name__ == "__main__":
    main(RunDir(Path(sys.argv[1]).absolute()))
