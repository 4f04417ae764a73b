"""The comparison as a table that fits its terminal, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpcdl.runs import compare_groups, words
from hpcdl.runs.compare import Comparison, Row
from hpcdl.runs.compare_groups import Group, Study
from hpcdl.runs.compare_metrics import Metric
from hpcdl.runs.compare_notes import best_of, honest, notes
from hpcdl.runs.compare_text import (
    BEST,
    FRONT,
    degrees,
    efficiency,
    figure,
    header,
    probability,
    short_ids,
    some,
    state,
    unfinished,
    value,
)

if TYPE_CHECKING:
    from rich.console import Console

REASONS_SHOWN = 20
NARROW = 100
"""Columns of a terminal in which room is saved."""
LONG = 10
"""Characters of a header that is folded then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of the table."""

    header: str
    cell: Callable[[Group], str]
    right: bool = True
    gives_way: int = 0
    """In which order columns are left out where the terminal is narrow, the highest first; 0: never."""


def as_json(comparison: Comparison, study: Study) -> dict[str, Any]:
    """Everything: runs as they are sorted, points that were refused, the keys that differ, groups and the best."""
    on_front = {row.run_id for group in study.groups if group.on_front for row in group.rows}
    runs = []
    for row in comparison.rows:
        plain = dataclasses.asdict(row)
        del plain["scales_with"], plain["apart_from_seed"]
        runs.append({**plain, "pareto": row.run_id in on_front})
    return {
        "runs": runs,
        "refused": [dataclasses.asdict(point) for point in comparison.refused],
        "differs": list(comparison.differs),
        "left_out": list(comparison.left_out),
        "metrics": [dataclasses.asdict(metric) for metric in study.metrics],
        "best": {metric.name: _ids(study.best(metric)) for metric in study.metrics},
        "pareto": {
            "metrics": [dataclasses.asdict(metric) for metric in study.pareto],
            "runs": _ids([group for group in study.groups if group.on_front]),
        },
        "groups": [compare_groups.as_json(group, study.metrics) for group in study.groups],
    }


def _ids(groups: Sequence[Group]) -> list[str]:
    return [row.run_id for group in groups for row in group.rows]


def print_comparison(console: Console, comparison: Comparison, study: Study) -> None:
    """The table, and below it what is best, what went wrong, what was refused, and what the figures are."""
    from rich.text import Text

    columns, hidden = fitting(columns_of(comparison, study), study.groups, console.width)
    print_table(console, columns, study.groups)
    for line in (*notes(comparison, study), *best_of(study), *honest(study)):
        console.print(Text(line, style="dim"))
    if hidden:
        names = ", ".join(column.header for column in hidden)
        console.print(Text(f"not shown in {console.width} columns: {names} (--json)", style="dim"))
    print_ends(console, comparison)


def print_table(console: Console, columns: Sequence[Column], groups: Sequence[Group]) -> None:
    """The rows; of states in their colour, of the best figures bold."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, gap(console.width), 0, 0), header_style="bold")
    for column in columns:
        justify = "right" if column.right else "left"
        head = "\n".join(folded(column.header, console.width))
        grid.add_column(head, justify=justify, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
    for group in groups:
        state = words.STYLES.get(group.row.state, "")
        cells = [(column.cell(group), state if column.header == "state" else "") for column in columns]
        grid.add_row(*(Text(text, style="bold" if text.endswith(BEST) else style) for text, style in cells))
    console.print(grid)


def print_ends(console: Console, comparison: Comparison) -> None:
    """What ended early, and what was refused."""
    rows = comparison.rows
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


def columns_of(comparison: Comparison, study: Study) -> list[Column]:
    """The columns, from left to right."""
    rows = comparison.rows
    ids = short_ids([row.run_id for row in rows])
    differs = [key for key in comparison.differs if not (study.seeds and key == "seed")]
    what = [
        Column(header="strategy", cell=lambda group: group.row.strategy, right=False),
        Column(
            header="degrees",
            cell=lambda group: degrees(group.row),
            right=False,
            gives_way=1 if _told_by_degrees(rows) else 5,
        ),
        Column(header="n×p", cell=lambda group: f"{group.row.nodes}×{group.row.processes_per_node}"),
        *(_differing(key, header) for key, header in _headers(differs)),
    ]
    if study.asked or study.seeds:  # the figures that are asked for, not what tells little of them
        what = _telling(what, study.groups)
    front = [_front_column()] if study.pareto else []
    figures = _figures(study) if study.asked or study.seeds else _usual(rows, study)
    last = [
        Column(header="state", cell=lambda group: state(group.row), right=False),
        Column(header="run", cell=lambda group: ids[group.row.run_id], right=False, gives_way=2),
    ]
    if study.seeds:
        last = [Column(header="runs", cell=lambda group: some(group, ids), right=False, gives_way=4)]
    return [*front, *what, *figures, *last]


def _telling(columns: Sequence[Column], groups: Sequence[Group]) -> list[Column]:
    """Columns whose cells differ; the first one, if none does."""
    telling = [column for column in columns if len({column.cell(group) for group in groups}) > 1]
    return telling or list(columns[:1])


def _front_column() -> Column:
    return Column(header=FRONT, cell=lambda group: FRONT if group.on_front else "", right=False)


def _usual(rows: Sequence[Row], study: Study) -> list[Column]:
    """What is shown of runs where nothing is asked for."""
    shared = {row.baseline for row in rows if row.baseline != row.run_id}

    def figure(name: str, gives_way: int = 0) -> Column:
        return _figure(Metric(name=name), study, gives_way)

    return [
        figure("tokens_per_s"),
        Column(header="eff.", cell=lambda group: efficiency(group.row, shared)),
        figure("step_s"),
        figure("peak_memory_bytes"),
        figure("comm_share"),
        figure("comm_bytes", gives_way=4),
        figure("loss"),
        figure("eval_loss", gives_way=3),
    ]


def _figures(study: Study) -> list[Column]:
    """The metrics; over seeds with their spread, and what comes of the first one's test."""
    if not study.seeds:
        return [_figure(metric, study) for metric in study.metrics]
    first = study.metrics[0]
    columns = [Column(header="n", cell=lambda group: _count(group, first.name))]
    for number, metric in enumerate(study.metrics):
        columns.append(_figure(metric, study, gives_way=0 if study.asked or not number else 3))
        if number == 0:
            columns += [
                Column(header="95 %", cell=lambda group: _interval(group, first.name), gives_way=5),
                Column(header="- best", cell=lambda group: _difference(group, first.name), gives_way=2),
                Column(header="p", cell=lambda group: _p(group, first.name)),
            ]
    return columns


def _figure(metric: Metric, study: Study, gives_way: int = 0) -> Column:
    several = len(study.groups) > 1
    spread = study.seeds

    def cell(group: Group) -> str:
        found = group.stats.get(metric.name)
        if found is None:
            return "-"
        text = figure(metric.name, found.mean, precise=spread)
        if found.sd:
            text += f" ± {figure(metric.name, found.sd, precise=spread)}"
        return f"{text}{BEST}" if several and metric.name in group.best_in else text

    return Column(header=header(metric.name), cell=cell, gives_way=gives_way)


def _count(group: Group, metric: str) -> str:
    """Seeds that count, of those that there are."""
    found = group.stats.get(metric)
    counted = found.n if found else 0
    return str(counted) if counted == len(group.rows) else f"{counted}/{len(group.rows)}"


def _interval(group: Group, metric: str) -> str:
    found = group.stats.get(metric)
    if found is None or found.low is None or found.high is None:
        return "-"
    return f"{figure(metric, found.low, precise=True)} … {figure(metric, found.high, precise=True)}"


def _difference(group: Group, metric: str) -> str:
    test = group.tests.get(metric)
    if test is None:
        return "-"
    sign = "+" if test.difference > 0 else "-"
    return f"{sign}{figure(metric, abs(test.difference), precise=True)}"


def _p(group: Group, metric: str) -> str:
    if metric in group.best_in:
        return "best"
    test = group.tests.get(metric)
    return "-" if test is None else probability(test.adjusted)


def _told_by_degrees(rows: Sequence[Row]) -> bool:
    """Whether only the degrees tell some runs of a strategy apart."""
    without = {(row.strategy, row.nodes, row.processes_per_node) for row in rows}
    return len({(row.strategy, row.nodes, row.processes_per_node, degrees(row)) for row in rows}) > len(
        without
    )


def _differing(key: str, header: str) -> Column:
    return Column(header=header, cell=lambda group: value(group.row.config.get(key)), gives_way=1)


def _headers(keys: Sequence[str]) -> list[tuple[str, str]]:
    """Each key with its last part, or the whole where that would fit two."""
    last = [key.rpartition(".")[2] for key in keys]
    return [(key, short if last.count(short) == 1 else key) for key, short in zip(keys, last, strict=True)]


def fitting(
    columns: Sequence[Column], groups: Sequence[Group], width: int
) -> tuple[list[Column], list[Column]]:
    """The columns that a terminal of this width can show, and those that it can't.

    A column in which no run has anything is left out first, then by `gives_way`; and before a column that tells runs
    apart, one that never gives way elsewhere and says the same of all of them.
    """
    cells = [[column.cell(group) for group in groups] for column in columns]
    widths = [
        max(map(len, (*folded(column.header, width), *texts)))
        for column, texts in zip(columns, cells, strict=True)
    ]
    order = [_gives_way(column, texts) for column, texts in zip(columns, cells, strict=True)]
    shown = list(range(len(columns)))
    while sum(widths[i] for i in shown) + gap(width) * (len(shown) - 1) > width:
        able = [i for i in shown if order[i]]
        if not able:
            break
        # Of several that give way alike the last one goes first.
        shown.remove(max(reversed(able), key=order.__getitem__))
    return [columns[i] for i in shown], [c for i, c in enumerate(columns) if i not in shown]


def _gives_way(column: Column, texts: Sequence[str]) -> float:
    """When it is left out, the highest first; 0: never."""
    if column.gives_way and all(text == "-" for text in texts):
        return 10 + column.gives_way
    if not column.gives_way and len(texts) > 1 and len(set(texts)) == 1:
        return 1.5
    return column.gives_way


def folded(header: str, width: int) -> list[str]:
    """A long header in two lines, where the terminal is narrow."""
    cuts = [i + 1 for i, char in enumerate(header[:-1]) if char in "_."]
    if width >= NARROW or len(header) <= LONG or not cuts:
        return [header]
    cut = min(cuts, key=lambda i: max(i, len(header) - i))
    return [header[:cut], header[cut:]]


def gap(width: int) -> int:
    """Blanks between columns."""
    return 1 if width < NARROW else 2
