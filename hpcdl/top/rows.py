"""A run as a line of the table: the columns that fit, and what stands in them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from rich.cells import cell_len
from rich.text import Text

from hpcdl.runs import judge, terminal, words
from hpcdl.runs.state import ACTIVE
from hpcdl.top.curve import sparkline
from hpcdl.top.reading import Row

FAILED = frozenset({"FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED", "CANCELLED"})
FULL = 0.9
"""Share of its memory from which a node is shown in red."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table."""

    title: str
    cell: Callable[[Row, int], Text]
    least: int
    """Characters."""
    most: int
    """It grows to so many where there is room."""
    place: int
    """Columns of a lower number come first where not all fit."""
    right: bool = False
    soon: int = 0
    """It grows to so many before any other grows further."""


def plain(text: object, style: str = "") -> Text:
    """What others wrote, on one line and harmless."""
    return Text(terminal.harmless(re.sub(r"[\r\n\t]+", " ", str(text))), style=style, no_wrap=True, end="")


def percent(value: float | None) -> str:
    """A share of 100; empty where it isn't known."""
    return "" if value is None else f"{value:.0f}%"


def size(count: float | None) -> str:
    """Bytes in at most five characters: `512M`, `12.3G`; empty where they aren't known."""
    if count is None:
        return ""
    number, unit = words.size(count).split(" ")
    return f"{number if len(number) < 5 else number.partition('.')[0]}{unit[0]}"


def clock_in(time: str | None) -> str:
    """A time ahead: `14:20 (in 2h)`; empty where there is none."""
    moment = words.parse(time)
    if moment is None:
        return ""
    ahead = -words.since(time)
    local = moment.astimezone()
    shown = (
        f"{local:%H:%M}" if ahead < 20 * 3600 else f"{local:%a %H:%M}" if ahead < 6e5 else f"{local:%Y-%m-%d}"
    )
    return f"{shown} (in {words.age(ahead)})" if ahead > 0 else f"{shown} (due)"


def start_words(row: Row) -> str:
    """When a pending run is expected to start; empty where nobody knows."""
    job = row.view.job
    return f"starts ~{clock_in(job.start)}" if job is not None and job.waiting and job.start else ""


def why(row: Row) -> str:
    """The queue's reason, or what went wrong."""
    job, state = row.view.job, row.state
    if job is not None and job.waiting and job.start and state.reason.startswith(job.reason):
        return judge.queue_reason(dataclasses.replace(job, start=None), state)
    return state.reason


def bar(done: float, width: int) -> str:
    """A bar of light and heavy lines, which can be told apart without colours."""
    full = round(max(0.0, min(1.0, done)) * width)
    return "━" * full + "─" * (width - full)


def done(row: Row) -> float:
    """Share of the steps that are done."""
    most = row.state.max_steps
    if most <= 0:
        return 0.0
    return 1.0 if row.step >= most else max(0, row.step) / most


def _progress(row: Row, width: int) -> Text:
    share = done(row)
    text = Text(no_wrap=True, end="")
    drawn = bar(share, width - 5)
    heavy = drawn.rstrip("─")
    text.append(heavy, style="green" if row.state.state == "COMPLETED" else "cyan")
    text.append(drawn[len(heavy) :], style="dim")
    # 100 % only where it is.
    return text.append(f" {min(int(100 * share), 99) if share < 1 else 100:3}%")


def _left(row: Row, _: int) -> Text:
    if row.state.state not in ACTIVE:
        took = words.between(row.state.started, row.state.ended)
        return plain(words.duration(took) if took else "", "dim")
    return plain(words.duration(row.left_s) if row.left_s is not None else "")


def _loss(row: Row, width: int) -> Text:
    if row.loss is None:
        return plain("")
    text = words.number(row.loss, 3)
    if row.loss != row.loss or abs(row.loss) == float("inf"):
        return plain(text, "bold red")
    return plain(text if len(text) <= width else f"{row.loss:.{max(0, width - 6)}e}")


def _memory(row: Row, width: int) -> Text:
    node = row.fullest
    used = row.peak_bytes if node is None else node.used_bytes
    share = node.share if node is not None else None
    style = "bold red" if share is not None and share >= FULL else ""
    if width >= 9 and share is not None:
        return plain(f"{size(used)} {percent(100 * share)}", style)
    return plain(percent(100 * share) if share is not None and share >= FULL else size(used), style)


def _mark(row: Row, _: int) -> Text:
    return Text("!", style="bold red", end="") if row.warnings else Text(" ", end="")


def _short_id(row: Row, width: int) -> Text:
    return plain(row.state.run_id[:width], "dim")


def _job(row: Row, _: int) -> Text:
    return plain(row.state.job_id or ("local" if row.state.kind == "local" else "-"))


COLUMNS = (
    Column("", _mark, 1, 1, 0),
    Column("run", _short_id, 6, 12, 2, soon=12),
    Column("name", lambda r, _: plain(r.state.name), 8, 40, 1, soon=16),
    Column("state", lambda r, _: plain(r.state.state, words.STYLES[r.state.state]), 9, 13, 0, soon=13),
    Column("progress", _progress, 10, 25, 3),
    Column("left", _left, 8, 11, 4, right=True),
    Column("loss", _loss, 6, 8, 5, right=True),
    Column("curve", lambda r, w: plain(sparkline(r.curve, w), "cyan"), 8, 30, 7),
    Column(
        "tok/s",
        lambda r, _: plain(words.short(r.tokens_per_s) if r.tokens_per_s else ""),
        6,
        6,
        6,
        right=True,
    ),
    Column("mem", _memory, 5, 10, 8, right=True),
    Column("cpu", lambda r, _: plain(percent(r.cpu_percent)), 5, 6, 10, right=True),
    Column("gpu", lambda r, _: plain(percent(r.gpu_percent)), 4, 4, 9, right=True),
    Column("nodes", lambda r, _: plain(r.state.nodes), 5, 5, 12, right=True),
    Column("job", _job, 7, 12, 11),
)
SPAN_FROM = 4
"""From this column on the queue's reason stands instead of what has not been measured yet."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns that fit into a width, and how wide each is."""

    columns: tuple[tuple[Column, int], ...]

    @property
    def heading(self) -> Text:
        """The columns' names."""
        cells = [fit(Text(column.title), width, right=column.right) for column, width in self.columns]
        return Text(" ", end="").join(cells)

    def line(self, row: Row) -> Text:
        """A run."""
        words_instead = _instead(row)
        cells, room = [], -1
        for column, width in self.columns:
            if words_instead is not None and column in COLUMNS[SPAN_FROM:]:
                room += width + 1
                continue
            cells.append(fit(_cell(column, row, width), width, right=column.right))
        if words_instead is not None and room > 0:
            cells.append(fit(words_instead, room))
        return Text(" ", end="").join(cells)


@cache
def layout(width: int) -> Layout:
    """The columns that fit: the most important first, the rest of the room shared among those that can grow."""
    chosen: list[Column] = []
    room = width
    for column in sorted(COLUMNS, key=lambda each: each.place):
        if column.least + bool(chosen) <= room:
            room -= column.least + bool(chosen)
            chosen.append(column)
        else:
            break  # no hole for a column that matters less
    widths = {column.title: column.least for column in chosen}
    while room > 0:
        growing = [c for c in chosen if widths[c.title] < c.most]
        if not growing:
            break
        first = [c for c in growing if widths[c.title] < c.soon]
        # The one that has had least of what it could use.
        column = min(
            first or growing,
            key=lambda c: (widths[c.title] - c.least) / ((c.soon if first else c.most) - c.least),
        )
        widths[column.title] += 1
        room -= 1
    return Layout(tuple((column, widths[column.title]) for column in COLUMNS if column in chosen))


def fit(text: Text, width: int, *, right: bool = False) -> Text:
    """A text of exactly this width, cut or padded."""
    text.no_wrap, text.end = True, ""
    if right and cell_len(text.plain) < width:
        text.pad_left(width - cell_len(text.plain))
    text.truncate(width, overflow="ellipsis", pad=True)
    return text


def _cell(column: Column, row: Row, width: int) -> Text:
    try:
        return column.cell(row, width)
    except (ArithmeticError, ValueError, TypeError):  # a number that is none: somebody else wrote the file
        return Text("?")


def _instead(row: Row) -> Text | None:
    """What stands where measurements would: why a run waits, or has never begun."""
    state = row.state
    if row.step or state.state == "COMPLETED":
        return None
    if state.state in FAILED:
        return plain(why(row), "red")
    text = "  ".join(part for part in (start_words(row), why(row)) if part)
    return plain(text or _before_the_first_step(row), "yellow")


def _before_the_first_step(row: Row) -> str:
    if row.unread:
        return "…"
    if row.state.state == "PENDING":
        return "in the queue"
    phases = {rank.phase for node in row.nodes for rank in node.sample.ranks}
    if "evaluation" in phases:
        return "evaluates before the first step …"
    return "at its first step …" if "step" in phases else "the workers are starting …"


def _rank(row: Row) -> int:
    order = ("RUNNING", "UNKNOWN", "PENDING")
    return order.index(row.state.state) if row.state.state in order else len(order)


def _by_state(row: Row) -> tuple[object, ...]:
    """Running ones, the longest first; those that wait, the next to start first; ended ones, the last first."""
    rank, state = _rank(row), row.state
    if rank == 2:
        start = row.view.job.start if row.view.job else None
        return (rank, start or "9", state.created, state.run_id)
    if rank == 3:
        return (rank, _reversed(state.ended or ""), "", state.run_id)
    return (rank, state.started or state.created, "", state.run_id)


def _reversed(text: str) -> tuple[int, ...]:
    return tuple(-ord(char) for char in text)


def _less(value: float | None) -> float:
    """For the largest first, and what isn't known last."""
    return float("inf") if value is None or value != value else -value


SORTS: dict[str, Callable[[Row], tuple[object, ...]]] = {
    "state": _by_state,
    "name": lambda row: (row.state.name, row.state.created),
    "progress": lambda row: (-done(row),),
    "left": lambda row: (row.left_s is None, row.left_s or 0.0),
    "loss": lambda row: (row.loss is None or row.loss != row.loss, row.loss or 0.0),
    "tok/s": lambda row: (_less(row.tokens_per_s),),
    "memory": lambda row: (_less(row.fullest.share if row.fullest else None), _less(_used(row))),
    "cpu": lambda row: (_less(row.cpu_percent),),
    "gpu": lambda row: (_less(row.gpu_percent),),
    "newest": lambda row: (_reversed(row.state.created),),
}
"""What `s` goes through; each the key that rows are sorted by."""


def _used(row: Row) -> float | None:
    node = row.fullest
    return row.peak_bytes if node is None else node.used_bytes


def ordered(rows: Sequence[Row], sort: str, pattern: str = "") -> list[Row]:
    """The rows that have the pattern in them, sorted.

    Args:
        rows: all.
        sort: a key of SORTS.
        pattern: looked for in names, ids, states, reasons, jobs and nodes, whatever the case; empty: all.
    """
    wanted = pattern.casefold()
    found = [row for row in rows if not wanted or wanted in _searched(row).casefold()]
    return sorted(found, key=lambda row: (*SORTS[sort](row), row.state.run_id))


def _searched(row: Row) -> str:
    state = row.state
    warnings = " ".join(warning.word for warning in row.warnings)
    return " ".join(
        (state.run_id, state.name, state.state, state.reason, state.job_id or "", *state.node_list, warnings)
    )
