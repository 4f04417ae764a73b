"""Supervised fine-tuning: conversations, with the loss on the answers only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, TaskSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(TaskSpec):
    """Nothing to configure but the sample."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """The data must say what an answer is."""
    if spec.data.kind not in ("jsonl", "hf"):
        yield Fault(
            key="task.name",
            value="sft",
            problem=f"takes the loss on answers only, and data={spec.data.kind} has no answers",
            allowed="task=sft with data=jsonl or data=hf",
            fix="data=jsonl, or task=pretrain",
        )
