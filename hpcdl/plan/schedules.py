"""In which order a rank of a pipeline goes forward and back: torch.distributed.pipelining's schedules without torch.

Each is written down after its class in torch 2.13 (pipelining/schedules.py); a test compares all of them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]
"""Forward; backward; the gradients of inputs alone; the gradients of weights that `I` has left."""


class Op(NamedTuple):
    """One pass of one micro-batch through one stage."""

    kind: Kind
    place: int
    """Of the rank's stages, the first is 0."""
    number: int
    """The micro-batch."""


@lru_cache(maxsize=4096)
def order(schedule: str, ranks: int, rank: int, each: int, micro_batches: int) -> tuple[Op, ...]:
    """What a rank does, bubbles left out.

    Args:
        schedule: a name in hpcdl.distributed.stages.SCHEDULES.
        ranks: of the pipeline.
        rank: which of them.
        each: stages a rank.
        micro_batches: that go through in one go.
    """
    made = _ORDERS[schedule](ranks, rank, each, micro_batches)
    return tuple(op for op in made if op.number < micro_batches)


class _Ops:
    """Operations in a row; each kind counts the micro-batches of each stage."""

    def __init__(self) -> None:
        self.made: list[Op] = []
        self._next: Counter[tuple[Kind, int]] = Counter()
        self._weights: deque[int] = deque()
        """Stages whose `I` is done and whose `W` isn't."""

    def add(self, kind: Kind, place: int) -> None:
        """The stage's next micro-batch; a whole backward pass is the next of `I` and `W` together."""
        counted: Kind = "I" if kind == "B" else kind
        self.made.append(Op(kind, place, self._next[counted, place]))
        self._next[counted, place] += 1
        if kind == "B":
            self._next["W", place] += 1
        if kind == "I":
            self._weights.append(place)

    def weights(self) -> None:
        """The oldest gradients of weights that wait, if any do."""
        if self._weights:
            self.add("W", self._weights.popleft())


def _gpipe(ranks: int, rank: int, each: int, micro_batches: int) -> list[Op]:
    """ScheduleGPipe: all forward, all back."""
    return [Op("F", 0, n) for n in range(micro_batches)] + [Op("B", 0, n) for n in range(micro_batches)]


def _1f1b(ranks: int, rank: int, each: int, micro_batches: int) -> Iterator[Op]:
    """Schedule1F1B: a micro-batch for each rank from here to the end, then back and forth."""
    ahead = min(micro_batches, ranks - rank)
    yield from (Op("F", 0, n) for n in range(ahead))
    for n in range(micro_batches):
        yield Op("B", 0, n)
        if n + ahead < micro_batches:
            yield Op("F", 0, n + ahead)


def _interleaved(
    ranks: int, rank: int, each: int, micro_batches: int, *, split: bool = False
) -> Iterator[Op]:
    """ScheduleInterleaved1F1B and, `split`, ScheduleInterleavedZeroBubble (_get_1f1b_rank_ops)."""
    a_round = micro_batches // max(1, micro_batches // ranks)
    count = each * micro_batches
    ahead = min((each - 1) * a_round + (1 if split else 2) * (ranks - 1 - rank), count)
    ops = _Ops()
    for step in range(count + ahead):
        if step < count:
            ops.add("F", step // a_round % each)
        if step < ahead:
            continue
        ops.add("I" if split else "B", each - 1 - (step - ahead) // a_round % each)
        if split and step - ahead >= rank:
            ops.weights()
    if split:
        for _ in range(count):
            ops.weights()
    yield from ops.made


def _interleaved_zb(ranks: int, rank: int, each: int, micro_batches: int) -> Iterator[Op]:
    return _interleaved(ranks, rank, each, micro_batches, split=True)


def _zbv(ranks: int, rank: int, each: int, micro_batches: int) -> list[Op]:
    """ScheduleZBVZeroBubble; passes beyond the last micro-batch are left out by `order`."""
    all_of_them = max(2 * ranks - 1, micro_batches)
    ops = _Ops()
    forward: Counter[int] = Counter()

    def go(place: int) -> None:
        ops.add("F", place)
        forward[place] += 1

    def back(place: int) -> None:
        ops.add("I", place)
        ops.weights()

    for _ in range(2 * (ranks - rank) - 1):
        go(0)
    for _ in range(rank):
        go(1)
        go(0)
    for _ in range(ranks - rank):
        go(1)
        back(1)
    while forward[1] < forward[0] or forward[0] < all_of_them:
        if forward[0] < all_of_them:
            go(0)
        back(0)
        go(1)
        back(1)
    # the last ones' gradients of weights: first this rank's first stage's, in turn with its passes, then the rest
    left = _Ops()
    left._next = ops._next
    for _ in range(rank):
        left.add("I", 0)
        left.add("I", 1)
    for _ in range(ranks - rank):
        left.add("I", 0)
        left.add("W", 0)
    for place in (1, 0):
        while left._next["W", place] < left._next["I", place]:
            left.add("W", place)
    return ops.made + left.made


def _dualpipev(ranks: int, rank: int, each: int, micro_batches: int) -> list[Op]:
    """ScheduleDualPipeV, its eight steps; of two passes that overlap the forward one is begun first."""
    ops = _Ops()
    to_end = ranks - rank - 1
    for _ in range(2 * to_end):
        ops.add("F", 0)
    for _ in range(rank + 1):
        ops.add("F", 0)
        ops.add("F", 1)
    for _ in range(to_end):
        ops.add("I", 1)
        ops.weights()
        ops.add("F", 1)
    for _ in range(micro_batches - 2 * ranks + rank + 1):
        ops.add("F", 0)
        ops.add("B", 1)
        ops.add("F", 1)
        ops.add("B", 0)
    for _ in range(to_end):
        ops.add("B", 1)
        ops.add("F", 1)
        ops.add("B", 0)
    half, split = (rank + 1) // 2, False
    for step in range(rank + 1):
        split = split or (step == half and rank % 2 == 1)
        ops.add("I" if split else "B", 1)
        split = split or (step == half and rank % 2 == 0)
        ops.add("I" if split else "B", 0)
    for _ in range(to_end):
        ops.weights()
        ops.add("I" if split else "B", 0)
    for _ in range(rank + 1):
        ops.weights()
    return ops.made


_ORDERS: dict[str, Callable[[int, int, int, int], list[Op] | Iterator[Op]]] = {
    "gpipe": _gpipe,
    "1f1b": _1f1b,
    "interleaved_1f1b": _interleaved,
    "interleaved_zb": _interleaved_zb,
    "zbv": _zbv,
    "dualpipev": _dualpipev,
}
