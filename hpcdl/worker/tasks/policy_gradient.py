"""Policy gradients: an environment is played, or a language model answers and is told what that was worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from hpcdl.spec import ExperimentSpec
from hpcdl.tasks import policy_gradient
from hpcdl.worker.tasks import pretrain

if TYPE_CHECKING:
    import torch

    from hpcdl.distributed.engine import Engine
    from hpcdl.runs.store import RunDir
    from hpcdl.worker.heartbeat import Progress
    from hpcdl.worker.process import Process
    from hpcdl.worker.rl.lesson import Lesson
    from hpcdl.worker.signals import Stop

CUTS_DOCUMENTS = pretrain.CUTS_DOCUMENTS
example = pretrain.example
prompt = pretrain.prompt


def train(
    spec: ExperimentSpec, run: RunDir, who: Process, device: torch.device, stop: Stop, progress: Progress
) -> None:
    """In the place of hpcdl.worker.training.train: samples are taken while it trains."""
    from hpcdl.worker.rl import runs

    work = runs.play if policy_gradient.is_played(spec) else runs.answer
    work(spec, run, who, device, stop, progress)


def attach(spec: ExperimentSpec, engine: Engine) -> Lesson:
    """Gives the language model GRPO's loss."""
    from hpcdl.worker.rl import answering, lesson

    config = cast(policy_gradient.Config, spec.task)
    stage = lesson.stage_of(engine.stages[0])
    engine.updates = config.updates(spec.trainer.global_batch_size)
    return lesson.Lesson(stage, answering.terms(config), engine.device)
