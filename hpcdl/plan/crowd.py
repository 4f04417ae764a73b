"""Micro-batches under way in a pipeline rank, moment by moment: what of them is there when one more goes through."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from hpcdl.distributed import stages as layout
from hpcdl.plan.schedules import order

ROUNDS = 4
"""Of micro-batches, ranks × stages each, after which a schedule repeats itself: more of them change nothing."""


class Crowd(NamedTuple):
    """What lies in a rank as a pass goes through one of its stages."""

    back: bool
    """Whether the pass is a backward one."""
    under_way: float
    """Micro-batches whose activations are there, this one too, in units of all of the rank's stages."""
    losses: int
    """Of them those that wait in the last stage with the loss's own gradients, this one left out."""
    split: float
    """Of them those whose gradients of weights are still to be computed, with what went back through them."""
    there: float
    """Share of the rank's stages that have gradients."""
    own: bool
    """Whether the stage that is gone through has."""
    end: bool
    """Whether the loss is in that stage."""


def alone(again: bool) -> tuple[Crowd, ...]:
    """Without a pipeline.

    Args:
        again: whether an earlier micro-batch has left its gradients.
    """
    return tuple(Crowd(back, 1.0, 0, 0.0, float(again), again, True) for back in (False, True))


@lru_cache(maxsize=4096)
def crowds(
    schedule: str, ranks: int, rank: int, sizes: tuple[int, ...], at_once: int, *, rounds: bool
) -> tuple[Crowd, ...]:
    """Those that no other has all of.

    Args:
        schedule: the pipeline's.
        ranks: of the pipeline.
        rank: which of them.
        sizes: blocks of each of its stages.
        at_once: micro-batches that go through in one go.
        rounds: whether there are more of them in a step, so that gradients are there from the beginning of the last.
    """
    each, blocks = len(sizes), max(1, sum(sizes))
    few = at_once if schedule == "gpipe" else _few(ranks, each, at_once)
    owner = layout.owner(layout.SCHEDULES[schedule].placement, ranks * each - 1, ranks)
    end = each - 1 if owner == rank else None
    forward: set[tuple[int, int]] = set()
    halfway: set[tuple[int, int]] = set()
    there = set(range(each)) if rounds else set()
    found: set[Crowd] = set()
    waiting = 0
    for kind, place, number in order(schedule, ranks, rank, each, few):
        this = place, number
        if kind == "F":
            forward.add(this)
            waiting += place == end
        if kind in "BI":
            halfway.discard(this)
        found.add(
            Crowd(
                back=kind != "F",
                under_way=_share(forward, sizes),
                losses=waiting - (place == end),
                split=_share(halfway, sizes),
                there=sum(sizes[at] for at in there) / blocks,
                own=place in there,
                end=place == end,
            )
        )
        if kind == "I":
            halfway.add(this)
        if kind in "BW":
            forward.discard(this)
            halfway.discard(this)
            there.add(place)
            waiting -= place == end
    return _most(found)


def _share(passes: Iterable[tuple[int, int]], sizes: tuple[int, ...]) -> float:
    """Blocks that they have gone through, in units of all of a rank's."""
    return sum(sizes[place] for place, _ in passes) / max(1, sum(sizes))


def _few(ranks: int, each: int, at_once: int) -> int:
    """As many micro-batches as show all that happens with `at_once` of them; groups stay as large as they are."""
    a_round = at_once // max(1, at_once // ranks)
    return min(at_once, a_round * ROUNDS * max(1, each))


def _most(found: Iterable[Crowd]) -> tuple[Crowd, ...]:
    """Without those that another one is above in all."""
    kept: list[Crowd] = []
    for one in sorted(found, reverse=True):
        if not any(
            other.back == one.back and all(a >= b for a, b in zip(other, one, strict=True)) for other in kept
        ):
            kept.append(one)
    return tuple(kept)
