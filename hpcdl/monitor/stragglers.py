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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hpcdl.monitor.judging import COLUMNS, LOOKS, Cause, Ranks, Times, Verdict, judge, median
from hpcdl.runs.files import read_lines
from hpcdl.runs.store import RunDir

__all__ = [
    "COLUMNS",
    "LOOKS",
    "Cause",
    "Ranks",
    "Row",
    "Suspicion",
    "Times",
    "Verdict",
    "as_event",
    "header",
    "history",
    "judge",
    "line",
    "median",
    "of_run",
]


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
