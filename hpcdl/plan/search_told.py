"""What a search tells: the choice and why, what it won against, the front; or why there is nothing to choose."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from hpcdl.plan import found as words
from hpcdl.plan import units
from hpcdl.plan.found import Found, Judged, Lost
from hpcdl.plan.search_costs import Costs
from hpcdl.plan.search_space import Choice

EQUAL = 0.05
"""Two step times that differ by less than this share are equal: the simpler choice wins.

Half of what a predicted step time is wrong by (docs/planner.md): a smaller lead says nothing of the measured
step, and the simpler way has less that a prediction can miss.
"""


def chosen(costs: Costs, fitting: list[Choice], possible: int, most: int) -> Found:
    """The best of what fits, and what it won against.

    Args:
        costs: what everything costs.
        fitting: the best choice of each mesh.
        possible: choices that there are.
        most: runners-up that are told.
    """
    quickest = min(costs.seconds(choice) for choice in fitting)
    equal = [choice for choice in fitting if costs.seconds(choice) <= (1 + EQUAL) * quickest]
    best = min(equal, key=lambda choice: (choice.effort, costs.seconds(choice), costs.peak(choice)))
    changes = _changes(costs, best)
    taken = costs.judged(best)
    assert taken is not None
    everything = costs.known()
    front = words.front(everything)
    on_it = {one.choice for one in front}
    return Found(
        chosen=taken,
        reasons=tuple(_reasons(costs, taken, everything, possible)),
        runners_up=tuple(_runners_up(costs, taken, fitting, everything, most)),
        changes=tuple(changes),
        front=front,
        others=tuple(one for one in everything if one.choice not in on_it),
        nearest=None,
        limit_bytes=costs.limit,
        possible=possible,
        looked_at=costs.looked_at,
    )


def _changes(costs: Costs, best: Choice) -> list[Lost]:
    """The chosen one with one thing changed, each way that there is."""
    changed: list[Choice] = []
    for recomputed in costs.ways.checkpointings():
        changed.append(dataclasses.replace(best, checkpointing=recomputed))
    for reshard in costs.ways.reshards(best):
        changed.append(dataclasses.replace(best, reshard=reshard))
    for schedule in costs.ways.schedules(best):
        changed.append(dataclasses.replace(best, schedule=schedule))
    for size in costs.ways.micro_batches(best.data_ranks):
        if size in (best.micro_batch_size // 2, best.micro_batch_size * 2):
            changed.append(dataclasses.replace(best, micro_batch_size=size))
    own, found = costs.judged(best), []
    assert own is not None
    for choice in dict.fromkeys(changed):
        one = None if choice == best or costs.refused(choice) else costs.judged(choice)
        if one is not None:
            found.append(Lost(judged=one, why=words.why_lost(one, own)))
    return found


def _runners_up(
    costs: Costs, chosen: Judged, fitting: list[Choice], everything: list[Judged], most: int
) -> Iterator[Lost]:
    """The next best of other meshes, and before them what would be quicker if it fitted."""
    large = sorted((one for one in everything if not one.fits), key=lambda one: one.over_bytes)
    better = [
        one for one in large if one.step_s < 0.99 * chosen.step_s and one.over_bytes < (costs.limit or 0)
    ]
    others = [choice for choice in fitting if choice.mesh != chosen.choice.mesh]
    slower = [costs.judged(choice) for choice in sorted(others, key=costs.seconds)[:most]]
    seen = {chosen.choice.mesh}
    for one in (*better, *slower):
        if one is None or one.choice.mesh in seen or (not one.fits and len(seen) > 2):
            continue
        seen.add(one.choice.mesh)
        yield Lost(judged=one, why=words.why_lost(one, chosen))


def _reasons(costs: Costs, chosen: Judged, everything: list[Judged], possible: int) -> Iterator[str]:
    fitting = sum(one.fits for one in everything)
    limit = "" if costs.limit is None else f" into {units.gib(costs.limit)} a process"
    yield (
        f"the quickest of {fitting} that were worked out and fit{limit}; of {possible} possible ones the"
        " others don't fit or can't be quicker"
    )
    if costs.limit is None:
        yield "nobody has said what memory a process has: whether it fits was not asked"
    choice = chosen.choice
    if choice.cpu_offload or choice.activation_offload != "none":
        yield "without host memory nothing fits"
    if costs.hardware.ranks_per_node % choice.tp:
        yield "tensor parallel goes over several nodes, because nothing fits otherwise"
    quicker = [one for one in everything if one.fits and one.step_s < chosen.step_s]
    if quicker:
        best = min(quicker, key=lambda one: one.step_s)
        yield f"{words.name(best.choice)} is no more than {EQUAL:.0%} quicker, and less simple"


def nothing(costs: Costs, possible: int) -> Found:
    """Nothing fits, or nothing can be said: what comes nearest."""
    known = [choice for choice, held in costs.peaks.items() if held]
    near = costs.judged(min(known, key=costs.peak)) if known else None
    if near is not None and near.over_bytes:
        way = f"{words.name(near.choice)} with {words.details(near.choice)}"
        reasons = [
            f"nothing fits into {units.gib(costs.limit or 0)} a process: the leanest, {way}, is"
            f" {units.gib(near.over_bytes)} too large"
        ]
    elif costs.unknown:
        reasons = [costs.unknown]
    else:
        reasons = [f"{fault.key} = {fault.value}: {fault.problem}" for fault in costs.faults[:3]]
        batch, world = costs.ways.spec.trainer.global_batch_size, costs.ways.spec.cluster.world_size
        reasons = reasons or [
            f"no degrees are possible: {batch} sequences a step, the model's heads, its blocks and a sequence"
            f" can't be shared out evenly over {world} processes"
        ]
    return Found(
        chosen=None,
        reasons=tuple(reasons),
        runners_up=(),
        changes=(),
        front=(),
        others=(),
        nearest=near,
        limit_bytes=costs.limit,
        possible=possible,
        looked_at=costs.looked_at,
        unknown=costs.unknown if near is None else "",
    )
