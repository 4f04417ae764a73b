"""Which rank the others wait for, and what keeps it.

All ranks show the same step time, since collectives hold them together: the slow one is the one that waits least.
`hpcdl.worker.waiting` looks at some steps now and then on all ranks alike; what is here is arithmetic on what it saw.

    own time    a step's seconds less those in which the rank waited for others in a collective
    window      LOOKS looks, of which medians are taken: ranks.jsonl has a line a window
    straggler   its own time is above the others' by more than chance in this window and the one before

Ranks that do other work by construction (a pipeline's stages) are compared with those of the same work; where there
is none, a rank must be slower both as it is and for the work that it was given.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hpcdl.runs.files import read_lines
from hpcdl.runs.store import RunDir

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
    def kept_s(self) -> float:
        """Kept from running by what else goes on on its node."""
        return max(self.delay_s, self.still_s)


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
class Row:
    """One rank in the table of `of_run`."""

    rank: int
    node: str
    times: Times
    """Medians of the last window."""

    @property
    def wait_share(self) -> float:
        """Share of its step in which it waits: least at the slowest."""
        return self.times.wait_s / self.times.step_s if self.times.step_s else 0.0


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


# --- judging ---------------------------------------------------------------------------------------------------


def judge(looks: Sequence[Sequence[Times]], ranks: Ranks) -> Verdict | None:
    """Whom the others wait for by these looks; None where nobody is slower by more than chance.

    A node whose ranks are all slower than those elsewhere goes before any of its ranks.

    Args:
        looks: one after another, each of all ranks in their order.
        ranks: where they are and what they do.
    """
    if not looks or len(ranks.nodes) < 2:
        return None
    seen = _Seen(looks=looks, usual=median(looks), ranks=ranks)
    found = _slow_node(seen)
    if found:
        return found
    slow = [v for v in (_slow_rank(seen, rank) for rank in _suspects(seen)) if v]
    return max(slow, key=lambda verdict: verdict.costs, default=None)


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


def _suspects(seen: _Seen) -> Iterator[int]:
    """The slowest few of those that have the same work: one of thousands needs no look at all of them."""
    of_work: dict[float, list[int]] = {}
    for rank, work in enumerate(seen.ranks.work):
        of_work.setdefault(work, []).append(rank)
    for alike in of_work.values():
        yield from sorted(alike, key=lambda rank: -seen.usual[rank].own_s)[:SUSPECTS]


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
    slowest = sorted(of_node, key=lambda name: -min(seen.usual[rank].own_s for rank in of_node[name]))
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
    looks, usual, ranks = seen.looks, seen.usual, seen.ranks
    ratio = _ratio(usual, ranks, here, others)
    if ratio < limit:
        return None
    agreeing = sum(_ratio(look, ranks, here, others) >= 1 + (limit - 1) * IN_EACH for look in looks)
    if agreeing < min(AGREE, len(looks)):
        return None
    own = [usual[r].own_s for r in others]
    typical = statistics.median(own)
    spread = 1.4826 * statistics.median(abs(value - typical) for value in own)
    most = max(here, key=lambda r: usual[r].own_s)
    excess = statistics.median(usual[r].own_s for r in here) - typical
    step_s = statistics.median(t.step_s for t in usual)
    if excess < LEAST_SHARE * step_s or (len(own) >= ENOUGH and excess < MADS * spread):
        return None
    cause, why = _cause(usual, most, others, excess)
    if len(here) > 1 and cause == "computing":
        cause, why = "its node", f"so are all its {len(here)} ranks"
    # What the others would win is no more than what they wait.
    waits = statistics.fmean(look[r].wait_s for look in looks for r in others)
    return Verdict(
        rank=most,
        node=ranks.nodes[most],
        ranks=tuple(here),
        slower_by=round(ratio, 3),
        costs=round(min(excess, waits) / step_s, 3) if step_s else 0.0,
        cause=cause,
        why=why,
    )


def _ratio(look: Sequence[Times], ranks: Ranks, here: Sequence[int], others: Sequence[int]) -> float:
    """Own time over others': the less of as it is and by work, which may not tell what a stage really takes."""

    def over(value: Mapping[int, float]) -> float:
        usual = statistics.median(value[r] for r in others)
        return statistics.median(value[r] for r in here) / usual if usual > 0 else 1.0

    own = {r: look[r].own_s for r in (*here, *others)}
    return min(over(own), over({r: value / ranks.work[r] for r, value in own.items()}))


def _cause(usual: Sequence[Times], rank: int, others: Sequence[int], excess: float) -> tuple[Cause, str]:
    """What most of the excess is."""

    def more(name: str) -> float:
        value = getattr(usual[rank], name)
        return float(value - statistics.median(getattr(usual[r], name) for r in others))

    data, kept = more("data_s"), more("kept_s")
    rest = excess - max(0.0, data) - max(0.0, kept)
    if data >= max(kept, rest):
        return "loading data", f"its batches take {_ms(usual[rank].data_s)} a step"
    if kept >= rest:
        if usual[rank].delay_s >= usual[rank].still_s:
            return "its node", f"others had its CPU for {_ms(usual[rank].delay_s)} of each step"
        return "its node", f"the process stood still for {_ms(usual[rank].still_s)} of each step"
    why = f"{_ms(usual[rank].own_s)} a step beside {_ms(usual[rank].own_s - excess)}"
    cpu = statistics.median(usual[r].cpu_s for r in others)
    if cpu > 0 and more("cpu_s") < excess / 4:
        why += ", no more of the CPU than the others"
    return "computing", why


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


# --- over time -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Suspicion:
    """What has been told: a straggler once two windows in a row agree, its end once two don't name it."""

    told: Verdict | None = None
    _last: Verdict | None = None
    _since: int = 0
    _absent: int = 0

    def hear(self, verdict: Verdict | None, first_step: int) -> tuple[str, Verdict, int] | None:
        """Takes a window's verdict in; the event that follows: its kind, of whom, and since which step.

        Args:
            verdict: the window's.
            first_step: the first step of the window.
        """
        before, self._last = self._last, verdict
        if verdict is None or before is None or not _same(verdict, before):
            since, self._since = self._since, first_step
        else:
            since = self._since
        if self.told is not None:
            self._absent = 0 if verdict is not None and _same(verdict, self.told) else self._absent + 1
            if self._absent < 2:
                return None
            over, self.told = self.told, None
            return "straggler_over", over, first_step
        if verdict is None or before is None or not _same(verdict, before):
            return None
        self.told, self._absent = verdict, 0
        return "straggler", verdict, since


def _same(one: Verdict, other: Verdict) -> bool:
    return bool(set(one.ranks) & set(other.ranks))


def as_event(verdict: Verdict, since_step: int) -> dict[str, Any]:
    """What the event `straggler` says: `{rank, node, slower_by, cause, since_step, …}`."""
    return {
        "rank": verdict.rank,
        "node": verdict.node,
        "slower_by": verdict.slower_by,
        "cause": verdict.cause,
        "since_step": since_step,
        "why": verdict.why,
        "costs": verdict.costs,
        **({"ranks": list(verdict.ranks)} if verdict.whole_node else {}),
    }


# --- ranks.jsonl -----------------------------------------------------------------------------------------------


def header(ranks: Ranks) -> dict[str, Any]:
    """What a try's first line says."""
    return {"nodes": list(ranks.nodes), "work": list(ranks.work)}


def line(step: int, times: Sequence[Times]) -> dict[str, Any]:
    """A window's line: a list over the ranks for each of COLUMNS."""
    return {"step": step, **{name: [float(f"{getattr(t, name):.4g}") for t in times] for name in COLUMNS}}


def of_run(run: RunDir) -> list[Row]:
    """Each rank's times in the last window that was measured, by rank; empty where none was (yet)."""
    rows: list[Row] = []
    for _, rows in history(run):  # noqa: B007
        pass
    return rows


def history(run: RunDir) -> Iterator[tuple[int, list[Row]]]:
    """Every window's last step and rows, the oldest first; those of all tries."""
    nodes: list[str] = []
    for record in read_lines(run.path / "ranks.jsonl"):
        told, step = record.get("nodes"), record.get("step")
        if isinstance(told, list):
            nodes = [str(name) for name in told]
        columns = [record.get(name) for name in COLUMNS]
        if (
            not nodes
            or not isinstance(step, int)
            or not all(_is_of(column, len(nodes)) for column in columns)
        ):
            continue
        yield (
            step,
            [
                Row(rank=rank, node=nodes[rank], times=Times(**dict(zip(COLUMNS, values, strict=True))))
                for rank, values in enumerate(zip(*columns, strict=True))
            ],
        )


def _is_of(column: object, count: int) -> bool:
    return (
        isinstance(column, list)
        and len(column) == count
        and all(isinstance(value, int | float) for value in column)
    )
