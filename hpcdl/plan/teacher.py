"""The frozen model that a student learns from (hpcdl/tasks/distill.py): its weights, its pass, what it leaves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hpcdl import compress, tasks
from hpcdl.compress import quant
from hpcdl.plan.block import Passing
from hpcdl.plan.decoder import Decoder
from hpcdl.plan.tape import Bytes, Tape
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.parallel import ParallelDims


@dataclass(frozen=True, kw_only=True)
class Teacher(Decoder):
    """A whole model on every rank, of which nothing is trained."""

    frozen = True

    @cached_property
    def bf16_weights(self) -> bool:
        """Whether its weights are in bf16."""
        told = getattr(self.spec.task, "teacher_precision", "auto")
        return self.bf16 if told == "auto" else bool(told == "bf16")

    @property
    def plain(self) -> int:
        """Bytes of a number, as it is held."""
        return 2 if self.bf16_weights else 4

    @property
    def seen(self) -> int:
        """The same in its passes."""
        return self.plain

    @cached_property
    def weights(self) -> float:
        """Bytes of all of them."""
        return float(self.plain * sum(m.numel * m.count for m in self.matrices))

    @property
    def taught(self) -> float:
        """Bytes of its last hidden states, which wait for the student's."""
        return self.plain * self.block.tokens * self.shape.hidden_size

    @cached_property
    def passing(self) -> Bytes:
        """Of a block's pass under no_grad, with the embedding's result."""
        tape = Tape()
        way = Passing(self.block, tape)
        size = self.residual * self.block.tokens * self.block.width
        embedded, x = tape.new(size), tape.var(size, wants=False)
        way.forward(x)
        tape.drop(embedded)
        return tape.at_peak


def of(spec: ExperimentSpec, device: str) -> Teacher | None:
    """The experiment's teacher; None where its task has none."""
    shape_of: Any = getattr(tasks.get(spec.task.name), "teacher_shape", None)
    shape = None if shape_of is None else shape_of(spec.task)
    if shape is None:
        return None
    plain = replace(
        spec,
        peft=compress.get("none").Config(name="none"),
        quant=quant.get("none").Config(scheme="none"),
    )
    alone = ParallelDims(pp=1, dp_replicate=1, dp_shard=1, cp=1, tp=1)
    return Teacher(spec=plain, shape=shape, device=device, dims=alone)
