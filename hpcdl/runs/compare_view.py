"""The comparison as a table that fits its terminal, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpcdl.runs import words
from hpcdl.runs.compare import Comparison, Row

if TYPE_CHECKING:
    from rich.console import Console

SHORT = {"dp_replicate": "rep", "dp_shard": "shard", "cp": "cp", "tp": "tp", "pp": "pp"}
REASONS_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of the table."""

    header: str
    cell: Callable[[Row], str]
    right: bool = True
    gives_way: int = 0
    """In which order columns are left out where the terminal is narrow, the highest first; 0: never."""


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything: runs as they are sorted, points that were refused, the keys that differ."""
    runs = []
    for row in comparison.rows:
        plain = dataclasses.asdict(row)
        del plain["scales_with"]
        runs.append(plain)
    return {
        "runs": runs,
        "refused": [dataclasses.asdict(point) for point in comparison.refused],
        "differs": list(comparison.differs),
        "left_out": list(comparison.left_out),
    }


def print_comparison(console: Console, comparison: Comparison) -> None:
    """The table, and below it what went wrong, what was refused, and what the figures are."""
    from rich.table import Table
    from rich.text import Text

    rows = comparison.rows
    columns, hidden = fitting(columns_of(comparison), rows, console.width)
    grid = Table(box=None, pad_edge=False, padding=(0, gap(console.width), 0, 0), header_style="bold")
    for column in columns:
        justify = "right" if column.right else "left"
        grid.add_column(column.header, justify=justify, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
    for row in rows:
        style = {"state": words.STYLES.get(row.state, "")}
        grid.add_row(*(Text(c.cell(row), style=style.get(c.header, "")) for c in columns))
    console.print(grid)
    for line in notes(comparison):
        console.print(Text(line, style="dim"))
    if hidden:
        names = ", ".join(column.header for column in hidden)
        console.print(Text(f"not shown in {console.width} columns: {names} (--json)", style="dim"))
    _print_list(console, "ended early", [unfinished(row) for row in rows if unfinished(row)])
    _print_list(console, "refused", [f"{point.overrides}: {point.reason}" for point in comparison.refused])


def _print_list(console: Console, title: str, lines: Sequence[str]) -> None:
    from rich.text import Text

    if not lines:
        return
    console.print(Text(f"{title} ({len(lines)})", style="bold"))
    for line in lines[:REASONS_SHOWN]:
        console.print(Text(f"  {line}"), soft_wrap=True)
    if len(lines) > REASONS_SHOWN:
        console.print(Text(f"  … and {len(lines) - REASONS_SHOWN} more (--json)"))


def columns_of(comparison: Comparison) -> list[Column]:
    """The columns, from left to right."""
    ids = short_ids([row.run_id for row in comparison.rows])
    shared = {row.baseline for row in comparison.rows if row.baseline != row.run_id}
    return [
        Column(header="strategy", cell=lambda row: row.strategy, right=False),
        Column(
            header="degrees",
            cell=degrees,
            right=False,
            gives_way=1 if _told_by_degrees(comparison.rows) else 5,
        ),
        Column(header="n×p", cell=lambda row: f"{row.nodes}×{row.processes_per_node}"),
        *(_differing(key, header) for key, header in _headers(comparison.differs)),
        Column(header="tokens/s", cell=lambda row: _with(words.short, row.tokens_per_s)),
        Column(header="eff.", cell=lambda row: efficiency(row, shared)),
        Column(header="step", cell=lambda row: _with(seconds, row.step_s)),
        Column(header="memory", cell=lambda row: _with(words.size, row.peak_memory_bytes)),
        Column(header="comm", cell=lambda row: _with(percent, row.comm_share)),
        Column(header="comm/step", cell=lambda row: _with(words.size, row.comm_bytes), gives_way=4),
        Column(header="loss", cell=lambda row: words.number(row.loss, 3)),
        Column(header="held-out", cell=lambda row: words.number(row.eval_loss, 3), gives_way=3),
        Column(header="state", cell=state, right=False),
        Column(header="run", cell=lambda row: ids[row.run_id], right=False, gives_way=2),
    ]


def _told_by_degrees(rows: Sequence[Row]) -> bool:
    """Whether only the degrees tell some runs of a strategy apart."""
    without = {(row.strategy, row.nodes, row.processes_per_node) for row in rows}
    return len({(row.strategy, row.nodes, row.processes_per_node, degrees(row)) for row in rows}) > len(
        without
    )


def _differing(key: str, header: str) -> Column:
    return Column(header=header, cell=lambda row: _value(row.config.get(key)), gives_way=1)


def _headers(keys: Sequence[str]) -> list[tuple[str, str]]:
    """Each key with its last part, or the whole where that would fit two."""
    last = [key.rpartition(".")[2] for key in keys]
    return [(key, short if last.count(short) == 1 else key) for key, short in zip(keys, last, strict=True)]


def fitting(columns: Sequence[Column], rows: Sequence[Row], width: int) -> tuple[list[Column], list[Column]]:
    """The columns that a terminal of this width can show, and those that it can't.

    A column in which no run has anything is left out first, then by `gives_way`.
    """
    shown, hidden = list(columns), []
    while _total(shown, rows, width) > width:
        able = [column for column in shown if column.gives_way]
        if not able:
            break
        # Of several that give way alike the last one goes first.
        empty = [c for c in able if all(c.cell(row) == "-" for row in rows)]
        least = max(reversed(empty or able), key=lambda column: column.gives_way)
        shown.remove(least)
        hidden.append(least)
    return shown, [column for column in columns if column in hidden]


def _total(columns: Sequence[Column], rows: Sequence[Row], width: int) -> int:
    cells = [max(len(text) for text in (c.header, *(c.cell(row) for row in rows))) for c in columns]
    return sum(cells) + gap(width) * (len(columns) - 1)


def gap(width: int) -> int:
    """Blanks between columns."""
    return 1 if width < 100 else 2


def notes(comparison: Comparison) -> list[str]:
    """What the figures are, in a line each."""
    rows = {row.run_id: row for row in comparison.rows}
    ids = short_ids(list(rows))
    lines = ["tokens/s, step: means over the logged steps but the first; memory: the highest of any rank"]
    others = {row.baseline: rows[row.baseline] for row in comparison.rows if row.baseline in rows}
    bases = [
        base for base in others.values() if any(r.baseline == base.run_id != r.run_id for r in rows.values())
    ]
    if bases:
        names = (f"{row.strategy} {row.nodes}×{row.processes_per_node} {ids[row.run_id]}" for row in bases)
        lines.append("eff.: tokens/s a process over that of " + ", ".join(names))
    return lines


def unfinished(row: Row) -> str:
    """Why a run is neither done nor under way, and how far it and its memory had come; empty if it is."""
    if row.state in ("COMPLETED", "RUNNING", "PENDING"):
        return ""
    name = f"{row.strategy} {row.nodes}×{row.processes_per_node} {row.run_id}"
    reached = ""
    if row.state == "OUT_OF_MEMORY" and row.peak_memory_bytes:
        reached = f" at {words.size(row.peak_memory_bytes)} a rank"
    elif row.state == "OUT_OF_MEMORY" and row.node_memory_bytes:
        reached = f" at {words.size(row.node_memory_bytes)} a node or more"
    why = f": {row.reason}" if row.reason else ""
    return f"{name}: {row.state}{reached} after {row.step} of {row.max_steps} steps{why}"


def state(row: Row) -> str:
    """The state, and how far a run has come that goes on."""
    return f"{row.state} {row.step}/{row.max_steps}" if row.state == "RUNNING" else row.state


def degrees(row: Row) -> str:
    """`rep2 tp2`; a dash for a single process."""
    return " ".join(f"{SHORT[name]}{degree}" for name, degree in row.degrees.items()) or "-"


def efficiency(row: Row, shared: set[str | None]) -> str:
    """In per cent; `base` for the run that others are compared with, a dash for one that nobody is."""
    if row.efficiency is None or row.baseline == row.run_id:
        return "base" if row.run_id in shared else "-"
    return percent(row.efficiency)


def short_ids(ids: Sequence[str], least: int = 5) -> dict[str, str]:
    """The beginning of each run id that tells it from the others: every command takes it."""
    for length in range(least, max(map(len, ids), default=least) + 1):
        if len({one[:length] for one in ids}) == len(set(ids)):
            return {one: one[:length] for one in ids}
    return {one: one for one in ids}


def seconds(value: float) -> str:
    """`87 ms`, `1.23 s`."""
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s"


def percent(share: float) -> str:
    """`87 %`."""
    return f"{100 * share:.0f} %"


def _with(text: Callable[[float], str], value: float | None) -> str:
    return "-" if value is None else text(value)


def _value(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    text = text.lower() if isinstance(value, bool) else text
    return text if len(text) <= 20 else text[:19] + "…"
