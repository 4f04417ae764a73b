"""The comparison as a picture: throughput against processes, memory, communication.

matplotlib is imported here and nowhere else on the login node, and only when a picture is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcdl.errors import UsageError
from hpcdl.runs import compare_plot_front
from hpcdl.runs.compare import Comparison, Row
from hpcdl.runs.compare_groups import Study

FORMATS = (".png", ".svg", ".pdf")


def default_file(comparison: Comparison) -> Path:
    """`<sweep>-compare.png` beside the sweep's record; `compare.png` here for other runs."""
    if comparison.sweep is None:
        return Path("compare.png")
    return comparison.sweep.with_name(f"{comparison.sweep.stem}-compare.png")


def check_name(file: Path) -> Path:
    """The file, if a picture can have this name.

    Raises:
        UsageError: its ending names no format.
    """
    if file.suffix not in FORMATS:
        raise UsageError(f"--plot {file}: a picture ends in {', '.join(FORMATS)}")
    return file


def draw(comparison: Comparison, study: Study, file: Path) -> None:
    """Writes the picture: of a front, where one is asked for, else of how the runs scale.

    Args:
        comparison: the runs.
        study: what is the best of them.
        file: where to.

    Raises:
        UsageError: matplotlib is missing, nothing was measured, or the file can't be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(11, 6) if study.pareto else (12, 4.2), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    if study.pareto:
        compare_plot_front.draw(figure, study)
    else:
        _scaling(figure, comparison)
    try:
        figure.savefig(file)
    except OSError as error:
        raise UsageError(f"{file}: can't be written ({error.strerror})") from error


def _scaling(figure: Any, comparison: Comparison) -> None:
    """Throughput, memory and communication against processes."""
    groups = series(comparison.rows)
    if not groups:
        raise UsageError("no run has measured a step yet: there is nothing to draw")
    panels = figure.subplots(1, 3)
    _lines(panels[0], groups, lambda row: row.tokens_per_s)
    _ideal(panels[0], groups)
    panels[0].set(title="Throughput", ylabel="tokens/s")
    _lines(panels[1], groups, _gib)
    panels[1].set(title="Peak memory of a process", ylabel="GiB")
    _lines(panels[2], groups, _share)
    panels[2].set(title="Communication", ylabel="% of a step")
    for panel in panels:
        _axes(panel, comparison.rows)
    figure.legend(*_entries(panels[0]), loc="outside lower center", ncols=6, frameon=False)


def series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The runs of each line: those that differ in their cluster and degrees only; by strategy."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.strategy, row.processes, row.nodes)):
        if row.tokens_per_s is not None or row.peak_memory_bytes is not None:
            groups.setdefault(row.scales_with, []).append(row)
    return {_name(same[0], rows): same for same in groups.values()}


def _name(row: Row, rows: Sequence[Row]) -> str:
    """The strategy, and what else tells this line from the others of the same strategy."""
    others = [other for other in rows if other.strategy == row.strategy]
    more = [
        f"{key.rpartition('.')[2]}={value}"
        for key, value in row.config.items()
        if not key.startswith("cluster.") and any(other.config.get(key) != value for other in others)
    ]
    return " ".join([row.strategy, *more])


def _lines(panel: Any, groups: Mapping[str, Sequence[Row]], value: Callable[[Row], float | None]) -> None:
    """A line a group through its quickest run at each number of processes; every run a mark, by its nodes."""
    for number, (name, rows) in enumerate(groups.items()):
        spread = min(0.05, 0.3 / len(groups))
        aside = 2 ** (spread * (number - (len(groups) - 1) / 2))  # equal values don't hide one another
        known = [(row, y) for row in rows if (y := value(row)) is not None]
        quickest: dict[int, tuple[Row, float]] = {}
        for row, y in sorted(known, key=lambda pair: pair[0].tokens_per_s or 0.0):
            quickest[row.processes] = (row, y)
        worlds = sorted(quickest)
        color = f"C{number % 10}"
        line = [quickest[world][1] for world in worlds]
        panel.plot([world * aside for world in worlds], line, color=color, linewidth=1.4, label=name)
        for row, y in known:
            panel.plot(
                row.processes * aside,
                y,
                marker="X" if row.state == "OUT_OF_MEMORY" else "o",
                markersize=7,
                color=color,
                markerfacecolor=color if row.nodes == 1 else "white",
            )


def _ideal(panel: Any, groups: Mapping[str, Sequence[Row]]) -> None:
    """Where the quickest of the smallest worlds would be with more processes, if they cost nothing."""
    rows = [row for same in groups.values() for row in same if row.tokens_per_s]
    if not rows:
        return
    base = min(rows, key=lambda row: (row.processes, -(row.tokens_per_s or 0)))
    worlds = sorted({row.processes for row in rows})
    if len(worlds) > 1 and base.tokens_per_s:
        each = base.tokens_per_s / base.processes
        ideal = [each * world for world in worlds]
        panel.plot(worlds, ideal, "--", color="0.7", linewidth=1, label="linear", zorder=0)


def _axes(panel: Any, rows: Sequence[Row]) -> None:
    worlds = sorted({row.processes for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(worlds, [str(world) for world in worlds])
    panel.set_xlim(worlds[0] / 1.3, worlds[-1] * 1.3)
    panel.minorticks_off()
    panel.set_xlabel("processes")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
    if not any(len(line.get_xdata()) for line in panel.lines):
        panel.text(0.5, 0.5, "not measured", ha="center", va="center", transform=panel.transAxes, color="0.5")
        panel.set_yticks([])


def _entries(panel: Any) -> tuple[list[Any], list[str]]:
    """The legend: each line once, and what the marks mean."""
    from matplotlib.lines import Line2D

    handles, labels = panel.get_legend_handles_labels()
    marks = (("one node", "o", "0.3"), ("several nodes", "o", "white"), ("out of memory", "X", "0.3"))
    for label, marker, fill in marks:
        handles.append(Line2D([], [], linestyle="", marker=marker, color="0.3", markerfacecolor=fill))
        labels.append(label)
    return handles, labels


def _gib(row: Row) -> float | None:
    return None if row.peak_memory_bytes is None else row.peak_memory_bytes / 2**30


def _share(row: Row) -> float | None:
    return None if row.comm_share is None else 100 * row.comm_share
