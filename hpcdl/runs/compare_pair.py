"""Two runs in two columns: what differs in their configs, then what came out of each, and the second over the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpcdl.runs import words
from hpcdl.runs.compare import Comparison
from hpcdl.runs.compare_groups import Study
from hpcdl.runs.compare_notes import best_of
from hpcdl.runs.compare_row import Row
from hpcdl.runs.compare_text import BEST, degrees, figure, short_ids, state
from hpcdl.runs.compare_view import print_ends

if TYPE_CHECKING:
    from rich.console import Console

USUAL = (
    *("tokens_per_s", "step_s", "efficiency", "peak_memory_bytes", "node_memory_bytes"),
    *("comm_share", "comm_bytes", "mfu", "loss", "eval_loss", "eval_perplexity"),
)
"""Figures that are shown of two runs where none is named."""
RATIO = 10
"""Characters of the last column."""
LEAST = 12
"""Characters of a run's column."""

Line = tuple[str, str, str, str]
"""A name, both runs' values, and the second over the first."""


def print_pair(console: Console, comparison: Comparison, study: Study) -> None:
    """Config, then results; as wide as the terminal, longer values on several lines."""
    from rich.table import Table
    from rich.text import Text

    a, b = in_order(comparison)
    ids = short_ids([a.run_id, b.run_id], least=8)
    config, results = config_lines(comparison), result_lines(comparison, study)
    head: Line = ("", f"A {ids[a.run_id]}", f"B {ids[b.run_id]}", "B / A")
    every = [head, *config, *results]
    name = max(len(line[0]) for line in every)
    room = max(LEAST, (console.width - name - RATIO - 6) // 2)
    widths = [name, *(min(room, max(len(line[i]) for line in every)) for i in (1, 2)), RATIO]
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for text, width, side in zip(head, widths, ("left", "left", "left", "right"), strict=True):
        grid.add_column(text, justify=side, overflow="fold", width=width)  # type: ignore[arg-type]
    for title, lines in (("config", config or [("no difference", "", "", "")]), ("results", results)):
        grid.add_row(Text(title, style="dim"))
        for line in lines:
            styles = [words.STYLES.get(cell.partition(" ")[0], "") for cell in line]
            grid.add_row(
                *(
                    Text(cell, style="bold" if cell.endswith(BEST) else style)
                    for cell, style in zip(line, styles, strict=True)
                )
            )
    console.print(grid)
    for text in best_of(study):
        console.print(Text(text, style="dim"), soft_wrap=True)
    print_ends(console, comparison)


def in_order(comparison: Comparison) -> list[Row]:
    """The two runs as they were named."""
    return sorted(comparison.rows, key=lambda row: comparison.named.index(row.run_id))


def config_lines(comparison: Comparison) -> list[Line]:
    """What differs, those first that tell most."""
    a, b = in_order(comparison)
    own = [
        ("name", a.name, b.name),
        ("parallel.name", a.strategy, b.strategy),
        ("degrees", degrees(a), degrees(b)),
        ("cluster.nodes", str(a.nodes), str(b.nodes)),
        ("cluster.processes_per_node", str(a.processes_per_node), str(b.processes_per_node)),
    ]
    differs = [key for key in comparison.differs if key != "name"]
    keys = [(key, _text(a, key), _text(b, key)) for key in differs]
    return [(name, one, other, "") for name, one, other in (*own, *keys) if one != other]


def result_lines(comparison: Comparison, study: Study) -> list[Line]:
    """What came out."""
    a, b = in_order(comparison)
    metrics = {metric.name: metric for metric in study.metrics}
    names: Sequence[str] = tuple(metrics) if study.asked else USUAL
    lines: list[Line] = [("state", state(a), state(b), ""), ("steps", _steps(a), _steps(b), "")]
    best = {
        name: {row.run_id for group in study.groups if name in group.best_in for row in group.rows}
        for name in names
    }
    for name in names:
        values = [row.figures.get(name) for row in (a, b)]
        if values == [None, None] or (name == "efficiency" and a.baseline != b.baseline):
            continue
        cells = [
            "-" if value is None else figure(name, value, precise=True) + _mark(row, best[name])
            for row, value in zip((a, b), values, strict=True)
        ]
        lines.append((name, *cells, _ratio(*values)))  # type: ignore[arg-type]
    return lines


def _mark(row: Row, best: set[str]) -> str:
    return f" {BEST}" if row.run_id in best and len(best) == 1 else ""


def _ratio(a: float | None, b: float | None) -> str:
    if not a or b is None:
        return ""
    ratio = b / a
    return f"{ratio:.3f} ×" if 0.01 <= abs(ratio) < 100 else f"{ratio:.3g} ×"


def _text(row: Row, key: str) -> str:
    value = row.config.get(key)
    if value is None:
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _steps(row: Row) -> str:
    return f"{row.step} of {row.max_steps}"
