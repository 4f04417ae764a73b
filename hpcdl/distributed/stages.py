"""How a pipeline is laid out: blocks → stages by cost, stages → ranks, and what each schedule asks for.

Arithmetic only, without torch: the login node checks with it what the compute nodes will do with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What a schedule of torch.distributed.pipelining asks for."""

    torch_name: str
    """Its class."""
    stages_per_rank: int = 1
    """Where the config leaves it open."""
    any_number: bool = False
    """Any other number of at least 2 will do too."""
    placement: Literal["loop", "v"] = "loop"
    """`loop`: rank r holds stages r, r + ranks, …; `v`: r and the one as far from the end."""
    splits_backward: bool = False
    """The gradients of inputs and of weights are computed at different times."""

    @property
    def one_stage(self) -> bool:
        """A rank has no more than one."""
        return self.stages_per_rank == 1 and not self.any_number


SCHEDULES = {
    "gpipe": Schedule(torch_name="ScheduleGPipe"),
    "1f1b": Schedule(torch_name="Schedule1F1B"),
    "interleaved_1f1b": Schedule(
        torch_name="ScheduleInterleaved1F1B", stages_per_rank=2, any_number=True
    ),
    "interleaved_zb": Schedule(
        torch_name="ScheduleInterleavedZeroBubble",
        stages_per_rank=2,
        any_number=True,
        splits_backward=True,
    ),
    "zbv": Schedule(
        torch_name="ScheduleZBVZeroBubble", stages_per_rank=2, placement="v", splits_backward=True
    ),
    "dualpipev": Schedule(
        torch_name="ScheduleDualPipeV", stages_per_rank=2, placement="v", splits_backward=True
    ),
}  # fmt: skip
"""By their names in `parallel.schedule`."""


def stages_per_rank(schedule: str, wanted: int) -> int:
    """Stages of each rank; `wanted` 0 leaves it to the schedule."""
    return wanted or SCHEDULES[schedule].stages_per_rank


def wants(schedule: str) -> str:
    """The stages of a rank that a schedule takes, in words."""
    kind = SCHEDULES[schedule]
    if kind.any_number:
        return f"{kind.stages_per_rank} stages or more"
    return f"exactly {kind.stages_per_rank} stage{'s' * (kind.stages_per_rank > 1)}"


def least_micro_batches(schedule: str, ranks: int) -> int:
    """Micro-batches that must be in the pipeline in one go, so that no rank is idle all along."""
    return 2 * ranks if schedule == "dualpipev" else ranks


def does_not_fit(schedule: str, ranks: int, micro_batches: int) -> str:
    """Why so many micro-batches can't go through the pipeline in one go; empty where they can."""
    least = least_micro_batches(schedule, ranks)
    if micro_batches < least:
        stages = f"{schedule}'s {least} stages" if least > ranks else f"its {ranks} ranks"
        return (
            f"a pipeline needs at least as many micro-batches in one go as {stages}, and has {micro_batches}"
        )
    # torch's rule for the interleaved ones, which run them in so many groups
    groups = max(1, micro_batches // ranks)
    if SCHEDULES[schedule].any_number and micro_batches % groups:
        return (
            f"{schedule} takes {micro_batches} micro-batches over {ranks} ranks in {groups} groups,"
            " which must be equal"
        )
    return ""


def owner(placement: str, stage: int, ranks: int) -> int:
    """The rank of the pipeline that holds a stage."""
    lap, place = divmod(stage, ranks)
    return ranks - 1 - place if placement == "v" and lap % 2 else place


def held_by(placement: str, rank: int, ranks: int, stages: int) -> list[int]:
    """The stages of a rank, in order."""
    return [stage for stage in range(stages) if owner(placement, stage, ranks) == rank]


def block_cost(shape: Any, seq_len: int) -> float:
    """Floating-point operations of a decoder block's forward pass, a token.

    Args:
        shape: ModelShape, or a transformers config.
        seq_len: tokens of a sequence; a token attends to half of them on average.
    """
    heads, width = shape.num_attention_heads, shape.hidden_size
    head_dim = getattr(shape, "head_dim", None) or width // heads
    projections = 2 * width * head_dim * (2 * heads + 2 * shape.num_key_value_heads)
    attention = 2 * 2 * heads * head_dim * seq_len / 2
    mlp = 2 * 3 * width * shape.intermediate_size
    return float(projections + attention + mlp)


def head_cost(shape: Any) -> float:
    """Floating-point operations of the output head, a token; the embedding, a look-up, has none."""
    return float(2 * shape.vocab_size * shape.hidden_size)


def partition(costs: Sequence[float], stages: int, *, head: float = 0.0) -> list[range]:
    """Consecutive blocks for each stage: the dearest stage as cheap as can be, the others as even as that allows.

    Exact, by dynamic programming: first the lowest possible maximum, then the least sum of squares under it.

    Args:
        costs: of each block, in order.
        stages: how many; none is left empty.
        head: what the last stage has besides its blocks.
    """
    assert 1 <= stages <= len(costs), "checked before submission"
    upto = [0.0, *itertools.accumulate(costs)]

    def cost(first: int, last: int) -> float:
        return upto[last] - upto[first] + (head if last == len(costs) else 0.0)

    highest, _ = _best(len(costs), stages, cost, max, math.inf)
    # the same sums, added up in the same order: equal ones are equal to the last bit
    _, ends = _best(len(costs), stages, lambda a, b: cost(a, b) ** 2, lambda x, y: x + y, highest**2)
    return [range(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def shares(blocks: int, count: int, head: float) -> list[int]:
    """Blocks of each stage, the last one with the output head: as `partition`, for equal blocks, at once.

    Args:
        blocks: of the model.
        count: stages.
        head: cost of the output head, in blocks.
    """
    if count == 1:
        return [blocks]

    def cost(last: int) -> tuple[float, float]:
        each, more = divmod(blocks - last, count - 1)
        others = more * (each + 1) ** 2 + (count - 1 - more) * each**2
        return max(each + (more > 0), last + head), others + (last + head) ** 2

    last = min(range(1, blocks - count + 2), key=cost)
    each, more = divmod(blocks - last, count - 1)
    return [*[each + (stage < more) for stage in range(count - 1)], last]


def _best(blocks: int, stages: int, cost: Any, together: Any, limit: float) -> tuple[float, list[int]]:
    """The least total of `stages` parts, none dearer than `limit`, and where each part ends."""
    # reached[b]: the best way to share the first b blocks among the stages so far
    reached: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for stage in range(stages):
        after: dict[int, tuple[float, list[int]]] = {}
        for last in range(stage + 1, blocks - (stages - stage - 1) + 1):
            ways = [
                (together(total, cost(first, last)), [*ends, last])
                for first, (total, ends) in reached.items()
                if first < last and cost(first, last) <= limit
            ]
            if ways:
                after[last] = min(ways, key=lambda way: way[0])
        reached = after
    return reached[blocks]
