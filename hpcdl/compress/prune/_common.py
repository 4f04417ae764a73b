"""What the methods share before submission: keys, rules, closed forms of memory. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, ModelShape, PruneSpec, layout
from hpcdl.spec.parallel import ParallelDims

GROUPS: dict[str, tuple[int, int]] = {"2:4": (2, 4), "4:8": (4, 8)}
"""Zeros among neighbours of a row, by pattern. 2:4 is what NVIDIA's sparse tensor cores take."""


SHARING = ("dp_shard", "tp", "pp", "cp")
"""Degrees that leave a rank a part of the model."""
PLAIN_STATE = ("adamw", "sgd")
"""Optimizers whose state is a number a weight."""
MASKED = ("lora", "rslora")
"""Methods whose update is one matrix, scale·B·A, which a mask can be laid on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PatternConfig(PruneSpec):
    """Keys of every method: how many zeros, and where they may be."""

    sparsity: Annotated[float, Interval(ge=0, lt=1)] = 0.5
    """Share of the weights of the blocks' linear layers that becomes zero; n:m patterns give it themselves."""
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"
    """`unstructured`: any weights; `2:4`: 2 of 4 neighbours in a row (what sparse tensor cores take); `4:8`."""
    scope: Literal["layer", "global"] = "layer"
    """Among which weights the least important are looked for: of each matrix, or of all together."""
    schedule: Literal["once", "cubic"] = "once"
    """`once`: before training, all at once; `cubic`: a little more every few steps while training goes on."""
    every: Annotated[int, Ge(1)] = 10
    """Steps from one pruning to the next, for `cubic`."""
    until: Annotated[int, Ge(0)] = 0
    """Step of the last pruning, for `cubic`; 0: half of trainer.max_steps."""


def sparsity_at(config: PatternConfig, step: int, max_steps: int) -> float | None:
    """Share of zeros that a step of training ends with; None where nothing is pruned then.

    From 0 quickly up, and slower and slower to the last: s·(1 - (1 - t/n)³).

    Source: Zhu & Gupta, "To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression",
    2017 (arXiv 1710.01878), equation 1.
    """
    last = config.until or max(1, max_steps // 2)
    if config.schedule == "once" or step > last or (step % config.every and step != last):
        return None
    return float(config.sparsity * (1 - (1 - step / last) ** 3))


def faults(config: PatternConfig, spec: ExperimentSpec) -> Iterator[Fault]:
    """What no method can do."""
    if config.schedule != "once":
        yield from _gradual(config, spec)
    if config.pattern in GROUPS:
        yield from _pattern(config, spec.model.shape)
    if spec.peft.name == "none" and spec.quant.scheme != "none":
        yield Fault(
            key="prune.name",
            value=spec.prune.name,
            problem=f"a layer that is trained through the rounding of quant={spec.quant.scheme} can't keep zeros too",
            allowed="quant=none, or peft=lora: the base is then pruned, quantized and frozen",
            fix="quant=none",
        )
    if spec.peft.name not in ("none", *MASKED):
        yield Fault(
            key="prune.name",
            value=spec.prune.name,
            problem=f"the update of peft={spec.peft.name} can't keep a pruned base's zeros: its other parts would be"
            " of unmasked weights",
            allowed=f"peft={', '.join(MASKED)} or none",
            fix="peft=lora",
        )
    dims = ParallelDims.possible(spec.parallel, spec.cluster.world_size)
    if dims is None:
        return
    if dims.tp > 1 and spec.peft.name != "none":
        yield Fault(
            key="prune.name",
            value=spec.prune.name,
            problem=f"an update that keeps {spec.peft.name}'s zeros is made whole before it is used, and tensor"
            " parallel has each matrix in parts",
            allowed="parallel.tp=1, or peft=none",
            fix="parallel.tp=1",
        )


def _gradual(config: PatternConfig, spec: ExperimentSpec) -> Iterator[Fault]:
    reasons = []
    if config.pattern in GROUPS:
        reasons.append((f"prune.pattern={config.pattern} can't be reached bit by bit", "prune.schedule=once"))
    if spec.peft.name != "none":
        reasons.append(
            (f"peft={spec.peft.name} trains beside a frozen base, whose zeros must be known", "peft=none")
        )
    if spec.parallel.name != "ddp" or any(getattr(spec.parallel, d) not in (1, -1) for d in SHARING):
        reasons.append(
            ("looks at the whole model again and again, and only plain ddp has it whole", "parallel=ddp")
        )
    if spec.optim.name not in PLAIN_STATE:
        reasons.append((f"must clear the state of weights that go, which optim={spec.optim.name} holds in 8 bits",
                        "optim=adamw"))  # fmt: skip
    if config.until > spec.trainer.max_steps:
        steps = spec.trainer.max_steps
        reasons.append((f"its last pruning, at step {config.until}, comes after the last step {steps}",
                        f"prune.until={steps}"))  # fmt: skip
    for problem, fix in reasons:
        yield Fault(
            key="prune.schedule",
            value=config.schedule,
            problem=problem,
            allowed="once, or as the fix says",
            fix=fix,
        )


def _pattern(config: PatternConfig, shape: ModelShape | None) -> Iterator[Fault]:
    zeros, group = GROUPS[config.pattern]
    given = zeros / group
    if config.sparsity != given:
        yield Fault(
            key="prune.sparsity",
            value=f"{config.sparsity:g}",
            problem=f"prune.pattern={config.pattern} has {zeros} zeros among {group} weights: a sparsity of {given:g}",
            allowed=f"{given:g}, or prune.pattern=unstructured",
            nearest=f"{given:g}",
            fix=f"prune.sparsity={given:g}",
        )
    if config.scope == "global":
        yield Fault(
            key="prune.scope",
            value="global",
            problem=f"prune.pattern={config.pattern} says how many zeros each group of {group} has: nothing is"
            " left to decide among matrices",
            allowed="layer, or prune.pattern=unstructured",
            fix="prune.scope=layer",
        )
    widths = {columns for _, columns in matrices(shape)} if shape is not None else set()
    uneven = sorted(columns for columns in widths if columns % group)
    if uneven:
        yield Fault(
            key="prune.pattern",
            value=config.pattern,
            problem=f"groups of {group} don't divide the model's rows of {uneven[0]} weights",
            allowed="unstructured, or a pattern whose groups do",
            fix="prune.pattern=unstructured",
        )


def refuse_global(config: PatternConfig, why: str) -> Iterator[Fault]:
    """For methods that decide matrix by matrix."""
    if config.scope == "global" and config.pattern not in GROUPS:
        yield Fault(
            key="prune.scope",
            value="global",
            problem=why,
            allowed="layer",
            nearest="layer",
            fix="prune.scope=layer",
        )


def matrices(shape: ModelShape) -> tuple[tuple[int, int], ...]:
    """Rows and columns of a block's linear layers."""
    return tuple((m.rows, m.columns) for m in layout.matrices(shape) if m.role == "block")


def prunable(shape: ModelShape) -> int:
    """Weights of all blocks' linear layers."""
    return shape.num_hidden_layers * sum(rows * columns for rows, columns in matrices(shape))


def masks(config: PatternConfig, shape: ModelShape) -> int:
    """Bytes of the masks while they are made: a byte a weight of one matrix, or of all where they compete."""
    if config.scope == "global" and config.pattern not in GROUPS:
        return prunable(shape)
    return max(rows * columns for rows, columns in matrices(shape))


def scores(config: PatternConfig, shape: ModelShape) -> int:
    """Bytes of fp32 scores held at a time, as many as the masks."""
    return 4 * masks(config, shape)


def streams(shape: ModelShape, samples: int, seq_len: int) -> int:
    """Bytes of the hidden states in fp32 that go from block to block: what went in and what comes out."""
    return 2 * 4 * samples * seq_len * shape.hidden_size


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedConfig(PatternConfig):
    """Keys of the methods that look at text too."""

    calibration_samples: Annotated[int, Ge(1)] = 32
    """Training sequences (of data.seq_len tokens, chosen by the seed) that are run through the model; the papers
    took 128 of 2,048 tokens."""
