"""Which rank of several is slow by more than chance, and what keeps it: arithmetic on looks at their steps."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

LOOKS = 5
"""Looks that make a window."""
AGREE = 4
"""Looks of a window in which a straggler must be slower."""
LIMIT = {2: 1.4, 3: 1.3}
"""By how many ranks are compared: times the others' own time that make a straggler."""
LIMIT_OF_MANY = 1.2
LIMIT_OF_UNLIKE = 1.5
"""Where no other rank has the same work."""
IN_EACH = 0.5
"""Share of the limit's excess that must be there in AGREE looks."""
LEAST_SHARE = 0.05
"""Less than this of a step's time is worth no word."""
MADS = 4.0
"""Scaled median absolute deviations of the others from their median, where they are enough to tell."""
ENOUGH = 4
SUSPECTS = 8

Cause = Literal["computing", "loading data", "its node"]

COLUMNS = ("step_s", "wait_s", "data_s", "cpu_s", "delay_s", "still_s")
"""Of ranks.jsonl: a list over the ranks each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """One rank's seconds a step."""

    step_s: float
    """Of the whole step."""
    wait_s: float
    """Waiting for others, in collectives that no computation hides."""
    data_s: float = 0.0
    """Waiting for its batches."""
    cpu_s: float = 0.0
    """Of a CPU, by its main thread."""
    delay_s: float = 0.0
    """Ready to run, while the CPU was somebody else's."""
    still_s: float = 0.0
    """All its threads stood still: stopped, swapped out, frozen, or throttled."""

    @property
    def own_s(self) -> float:
        """What the step would take if nobody had to be waited for."""
        return max(0.0, self.step_s - self.wait_s)

    @property
    def free_s(self) -> float:
        """Its own time as it would be if nobody else had used its CPU: what a busy machine doesn't hide."""
        return max(self.own_s - self.delay_s, min(self.own_s, self.cpu_s))

    @property
    def kept_s(self) -> float:
        """Kept from running by what else goes on on its node."""
        return max(self.delay_s, self.still_s)

    @property
    def stopped_s(self) -> float:
        """Of kept_s: not even ready to run."""
        return max(0.0, self.still_s - self.delay_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Who is compared."""

    nodes: tuple[str, ...]
    """Of each rank."""
    work: tuple[float, ...]
    """Each rank's share of the work by construction, in any unit."""

    def peers(self, rank: int) -> list[int]:
        """The other ranks with the same work; empty where it is alone with its."""
        return [r for r, work in enumerate(self.work) if r != rank and abs(work - self.work[rank]) < 1e-9]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whom the others wait for."""

    rank: int
    """Of several on one node the slowest."""
    node: str
    ranks: tuple[int, ...]
    """All of them."""
    slower_by: float
    """Its own time over that of the ranks it is compared with."""
    costs: float
    """Share of a step's time that all ranks would win without it."""
    cause: Cause
    why: str
    """What says so, in words."""

    @property
    def whole_node(self) -> bool:
        """Whether it is all ranks of a node."""
        return len(self.ranks) > 1

    @property
    def words(self) -> str:
        """One line for the log."""
        who = f"all ranks of node {self.node}" if self.whole_node else f"rank {self.rank} (node {self.node})"
        return (
            f"{who}: {self.slower_by:.2f} times the others' own time, {self.cause}: {self.why}; the others wait"
            f" for it {100 * self.costs:.0f} % of each step"
        )


def judge(looks: Sequence[Sequence[Times]], ranks: Ranks) -> Verdict | None:
    """Whom the others wait for by these looks; None where nobody is slower by more than chance.

    A node whose ranks are all slower than those elsewhere goes before any of its ranks.

    Args:
        looks: one after another, each of all ranks in their order.
        ranks: where they are and what they do.
    """
    if not looks or len(ranks.nodes) < 2:
        return None
    usual = median(looks)
    for measure in ("own_s", "free_s"):
        values = [[getattr(times, measure) for times in look] for look in looks]
        seen = _Seen(
            looks=looks,
            usual=usual,
            ranks=ranks,
            measure=measure,
            values=values,
            typical=[statistics.median(of_rank) for of_rank in zip(*values, strict=True)],
        )
        found = _slow_node(seen)
        if found is None:
            slow = [v for v in (_slow_rank(seen, rank) for rank in _suspects(seen)) if v]
            found = max(slow, key=lambda verdict: verdict.costs, default=None)
        if found is not None:
            return found
    return None


def median(looks: Sequence[Sequence[Times]]) -> list[Times]:
    """Each rank's medians over looks."""
    return [
        Times(**{name: statistics.median(getattr(t, name) for t in of_rank) for name in COLUMNS})
        for of_rank in zip(*looks, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What is judged."""

    looks: Sequence[Sequence[Times]]
    usual: Sequence[Times]
    """Each rank's medians over them."""
    ranks: Ranks
    measure: str
    """What is compared: a name of Times."""
    values: Sequence[Sequence[float]]
    """Its seconds, of each rank in each look."""
    typical: Sequence[float]
    """Each rank's median of those."""


def _suspects(seen: _Seen) -> Iterator[int]:
    """The slowest few of those that have the same work: one of thousands needs no look at all of them."""
    of_work: dict[float, list[int]] = {}
    for rank, work in enumerate(seen.ranks.work):
        of_work.setdefault(work, []).append(rank)
    for alike in of_work.values():
        yield from sorted(alike, key=lambda rank: -seen.typical[rank])[:SUSPECTS]


def _slow_rank(seen: _Seen, rank: int) -> Verdict | None:
    ranks = seen.ranks
    peers = ranks.peers(rank)
    unlike = not peers
    others = peers or [r for r in range(len(ranks.nodes)) if r != rank]
    limit = LIMIT_OF_UNLIKE if unlike else LIMIT.get(len(others) + 1, LIMIT_OF_MANY)
    return _slower(seen, [rank], others, limit)


def _slow_node(seen: _Seen) -> Verdict | None:
    """A node of several ranks, each slower than what is usual elsewhere."""
    ranks = seen.ranks
    of_node: dict[str, list[int]] = {}
    for rank, name in enumerate(ranks.nodes):
        of_node.setdefault(name, []).append(rank)
    slowest = sorted(of_node, key=lambda name: -min(seen.typical[rank] for rank in of_node[name]))
    verdicts = []
    for node in slowest[:SUSPECTS]:
        here = of_node[node]
        elsewhere = [rank for rank, name in enumerate(ranks.nodes) if name != node]
        if len(here) < 2 or not elsewhere:
            continue
        limit = LIMIT.get(len(of_node), LIMIT_OF_MANY)
        if len(set(ranks.work)) > 1:
            limit = LIMIT_OF_UNLIKE
        together = _slower(seen, here, elsewhere, limit)
        least = 1 + (limit - 1) * IN_EACH
        if together and all(_slower(seen, [rank], elsewhere, least) for rank in here):
            verdicts.append(together)
    return max(verdicts, key=lambda verdict: verdict.costs, default=None)


def _slower(seen: _Seen, here: Sequence[int], others: Sequence[int], limit: float) -> Verdict | None:
    """Whether these ranks' median is above that of others by `limit` times, and by more than chance."""
    usual, ranks, typical = seen.usual, seen.ranks, seen.typical
    ratio = _ratio(typical, ranks, here, others)
    if ratio < limit:
        return None
    least = 1 + (limit - 1) * IN_EACH
    agreeing = sum(_ratio(values, ranks, here, others) >= least for values in seen.values)
    if agreeing < min(AGREE, len(seen.looks)):
        return None
    own = [typical[r] for r in others]
    middle = statistics.median(own)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in own)
    most = max(here, key=lambda r: typical[r])
    excess = statistics.median(typical[r] for r in here) - middle
    step_s = statistics.median(t.step_s for t in usual)
    if excess < LEAST_SHARE * step_s or (len(own) >= ENOUGH and excess < MADS * spread):
        return None
    cause, why = _cause(seen, most, others, excess)
    if len(here) > 1 and cause == "computing":
        cause, why = "its node", f"so are all its {len(here)} ranks"
    # What the others would win is no more than what they wait.
    waits = statistics.fmean(look[r].wait_s for look in seen.looks for r in others)
    return Verdict(
        rank=most,
        node=ranks.nodes[most],
        ranks=tuple(here),
        slower_by=round(ratio, 3),
        costs=round(min(excess, waits) / step_s, 3) if step_s else 0.0,
        cause=cause,
        why=why,
    )


def _ratio(values: Sequence[float], ranks: Ranks, here: Sequence[int], others: Sequence[int]) -> float:
    """Seconds over others': the less of as they are and by work, which may not tell what a stage really takes."""

    def over(work: Sequence[float] | None) -> float:
        by = [value if work is None else value / work[rank] for rank, value in enumerate(values)]
        usual = statistics.median(by[r] for r in others)
        return statistics.median(by[r] for r in here) / usual if usual > 0 else 1.0

    alike = len({ranks.work[r] for r in (*here, *others)}) == 1
    return over(None) if alike else min(over(None), over(ranks.work))


def _cause(seen: _Seen, rank: int, others: Sequence[int], excess: float) -> tuple[Cause, str]:
    """What most of the excess is."""
    usual = seen.usual

    def more(name: str) -> float:
        value = getattr(usual[rank], name)
        return float(value - statistics.median(getattr(usual[r], name) for r in others))

    data, kept = more("data_s"), more("kept_s" if seen.measure == "own_s" else "stopped_s")
    rest = excess - max(0.0, data) - max(0.0, kept)
    if data >= max(kept, rest):
        return "loading data", f"its batches take {_ms(usual[rank].data_s)} a step"
    if kept >= rest:
        if usual[rank].delay_s >= usual[rank].still_s:
            return "its node", f"others had its CPU for {_ms(usual[rank].delay_s)} of each step"
        return "its node", f"the process stood still for {_ms(usual[rank].still_s)} of each step"
    own_s = seen.typical[rank]
    why = f"{_ms(own_s)} a step beside {_ms(own_s - excess)}"
    cpu = statistics.median(usual[r].cpu_s for r in others)
    if cpu > 0 and more("cpu_s") < excess / 4:
        why += ", no more of the CPU than the others"
    return "computing", why


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
