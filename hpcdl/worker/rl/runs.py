"""A run of policy gradients from its policy to its result: every part made, put together and driven."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hpcdl.distributed.mesh import Grid
from hpcdl.runs.store import RunDir
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.checkpoint import Totals
from hpcdl.spec.parallel import ParallelDims
from hpcdl.worker import control, network, resume, rng, trackers, training
from hpcdl.worker import result as results
from hpcdl.worker.cache import anew
from hpcdl.worker.checkpoint import Checkpointer
from hpcdl.worker.heartbeat import Progress
from hpcdl.worker.keeping import Keeper
from hpcdl.worker.metrics import Metrics
from hpcdl.worker.process import Process
from hpcdl.worker.rl import finish, loop
from hpcdl.worker.rl.answering import Answerer
from hpcdl.worker.rl.playing import Player
from hpcdl.worker.rl.problems import Problems
from hpcdl.worker.signals import Stop


def play(
    spec: ExperimentSpec, run: RunDir, who: Process, device: torch.device, stop: Stop, progress: Progress
) -> None:
    """REINFORCE or PPO in an environment; the first rank leaves the result and the outcome."""
    grid = Grid(ParallelDims.fill(spec.parallel, who.world_size), device)
    player = Player(spec, grid)
    weights = control.fingerprint(player.policy.parameters())
    keeper = Keeper(run, who, spec.trainer)
    found = resume.choose(run, who, keeper, weights, device, spec.trainer.resume_from)
    first_step = resume.first_step(run, found)
    config = player.config
    digest = f"{config.environment}, {config.envs} × {config.steps}"
    saver = Checkpointer(
        run, who, player.engine, spec, keeper, data_digest=digest, first_step=first_step
    )  # fmt: skip
    rng.seed_all(spec.seed, who.rank)
    totals = resume.totals_from(run, found)
    if found is not None:
        saver.load(found)
        if who.is_first:
            run.event("resumed", step=found.step, **{"from": str(found.path)})

    def result(metrics: Metrics) -> None:
        folder = run.path / "model"
        anew(folder, lambda made: finish.save_policy(player.policy, spec, player.sizes, made))
        count = sum(p.numel() for p in player.policy.parameters())
        done = finish.Done(
            spec=spec, run=run, who=who, metrics=metrics, totals=totals, counts=player.counts,
            what=f"{config.method} on {config.environment}",
            sizes={"parameters": count, "trainable_parameters": count},
        )  # fmt: skip
        finish.save(done, {"model": str(folder), "adapter": None})

    job = Job(spec=spec, run=run, who=who, saver=saver, totals=totals, first_step=first_step)
    drive(job, player, stop, progress, result)
    player.close()


def answer(
    spec: ExperimentSpec, run: RunDir, who: Process, device: torch.device, stop: Stop, progress: Progress
) -> None:
    """GRPO on a language model; the first rank leaves the result and the outcome."""
    ready = training.prepare(spec, run, who, device, Problems)
    learner = Answerer(spec, ready)
    if who.is_first:
        training.announce(spec, run, who, ready)

    def result(metrics: Metrics) -> None:
        net = ready.net
        if not ready.engine.is_whole:
            path = ready.saver.path_of(ready.totals.step)
            net = network.from_checkpoint(spec, ready.place, path, device)
        finished = results.Finished(
            spec=spec, run=run, who=who, net=net, size=ready.size, tokenizer=ready.tokenizer, metrics=metrics,
            totals=ready.totals, place=ready.place, mfu_of=None,
        )  # fmt: skip
        before, after = results.samples(finished)
        weights, _ = results.save_weights(finished)
        is_adapter = weights.name == "adapter"
        done = finish.Done(
            spec=spec, run=run, who=who, metrics=metrics, totals=ready.totals, counts=learner.counts,
            what=f"{spec.model.name} rewarded for {Path(str(learner.config.reward)).stem}",
            sizes={"parameters": ready.size.parameters, "trainable_parameters": ready.size.trainable},
        )  # fmt: skip
        finish.save(
            done,
            {"model": None if is_adapter else str(weights), "adapter": str(weights) if is_adapter else None},
            {"prompt": spec.task.sample_prompt, "before": before, "after": after},
        )

    job = Job(
        spec=spec, run=run, who=who, saver=ready.saver, totals=ready.totals, first_step=ready.first_step
    )  # fmt: skip
    drive(job, learner, stop, progress, result)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is driven, besides the Learner."""

    spec: ExperimentSpec
    run: RunDir
    who: Process
    saver: Checkpointer
    totals: Totals
    first_step: int


def drive(
    job: Job, learner: loop.Learner, stop: Stop, progress: Progress, result: Callable[[Metrics], None]
) -> None:
    """The iterations that are left; on the first rank their metrics, the result and the outcome."""
    run, who, totals = job.run, job.who, job.totals
    progress.begin(totals.step)
    lines = Metrics(run, active=who.is_first)
    if who.is_first:
        if who.restart:
            run.event("restarted", restart=who.restart)
        job.saver.clean()
        lines.rewind(totals.step)
    tracker = trackers.start(job.spec, run, active=who.is_first)
    parts = loop.Parts(
        spec=job.spec, run=run, who=who, learner=learner, saver=job.saver, metrics=lines, stop=stop,
        progress=progress, first_step=job.first_step,
    )  # fmt: skip
    reason = loop.run(parts, totals)
    learner.engine.close()
    progress.end()
    if who.is_first:
        if reason is None:
            result(lines)
        training.write_outcome(run, who, totals.step, reason)
        tracker.finish(trackers.FINISH_S if reason is None else trackers.STOPPED_S)
