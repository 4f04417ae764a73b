"""Evaluation: the loss of a model on held-out text, as a run with a result; nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, TaskSpec
from hpcdl.spec.parallel import ParallelDims

PLANNED = False
"""Whether the closed form of a training step's memory (hpcdl.plan) is this task's too: nothing is kept for a
backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(TaskSpec):
    """Nothing to configure but the sample: what is read is said by `data` and `trainer.eval_samples`."""


def why_unplanned(spec: ExperimentSpec) -> str:
    """Why hpcdl.plan knows no closed form."""
    return "task=eval trains nothing: the closed form is of a training step"


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """One set of weights, which every rank has all of or gathers: not copies that train by themselves."""
    if ParallelDims.possible(spec.parallel, spec.cluster.world_size) is None:
        return
    if not hasattr(spec.parallel, "reshard_after_forward"):
        yield Fault(
            key="parallel",
            value=spec.parallel.name,
            problem="is a way of training: nothing is trained here",
            allowed="ddp, fsdp, hsdp, tp, pp, cp",
            nearest="ddp",
            fix="parallel=ddp",
        )
