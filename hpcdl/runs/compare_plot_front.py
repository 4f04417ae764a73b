"""The front of `--pareto` as a picture: every configuration a mark, the front a line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcdl.errors import UsageError
from hpcdl.runs.compare_groups import Group, Study
from hpcdl.runs.compare_metrics import Metric
from hpcdl.runs.compare_text import figure, header, value

NAMED = 12
"""Points of the front that are told by name; of more, so many that lie evenly along it."""


def draw(figure_: Any, study: Study) -> None:
    """Draws the front of the first two metrics; a third one is the marks' colour.

    Args:
        figure_: matplotlib's.
        study: with its front.

    Raises:
        UsageError: no run has both.
    """
    x, y, *more = study.pareto
    points = [group for group in study.groups if all(m.name in group.stats for m in study.pareto)]
    if not points:
        names = ", ".join(metric.name for metric in study.pareto)
        raise UsageError(f"no run has {names}: there is no front to draw")
    panel = figure_.subplots()
    on = [group for group in points if group.on_front]
    rest = [group for group in points if not group.on_front]
    if more:
        colours = [_at(group, more[0]) for group in (*rest, *on)]
        every = [*rest, *on]
        marks = panel.scatter(
            [_at(g, x) for g in every], [_at(g, y) for g in every], c=colours, s=26, cmap="viridis"
        )
        figure_.colorbar(marks, label=_label(more[0]))
    else:
        panel.scatter(
            [_at(g, x) for g in rest], [_at(g, y) for g in rest], s=18, color="0.65", label="beaten"
        )
    _front(panel, on, x, y, filled=not more)
    _spread(panel, on, x, y)
    _names(panel, on, x, y)
    panel.set(xlabel=_label(x), ylabel=_label(y), title=f"{len(on)} of {len(points)} are beaten by none")
    panel.xaxis.set_major_formatter(lambda at, _: figure(x.name, at, precise=True))
    panel.yaxis.set_major_formatter(lambda at, _: figure(y.name, at, precise=True))
    panel.grid(alpha=0.25)
    panel.margins(0.1)
    panel.spines[["top", "right"]].set_visible(False)
    figure_.legend(loc="outside right upper", frameon=False, fontsize=8, handlelength=1.2)


def _front(panel: Any, on: Sequence[Group], x: Metric, y: Metric, *, filled: bool) -> None:
    """The points of the front; of two metrics with the steps between which everything is beaten."""
    ordered = sorted(on, key=lambda group: _at(group, x))
    xs, ys = [_at(group, x) for group in ordered], [_at(group, y) for group in ordered]
    if filled:
        # Between two points the one is reached that is no better in x.
        where = "post" if x.better == "min" else "pre"
        panel.step(xs, ys, where=where, color="C3", linewidth=1.3)
        panel.scatter(xs, ys, s=40, color="C3", zorder=3, label="front")
    else:
        panel.scatter(xs, ys, s=90, facecolors="none", edgecolors="C3", linewidths=1.4, label="front")


def _spread(panel: Any, on: Sequence[Group], x: Metric, y: Metric) -> None:
    """One standard deviation over the seeds to either side."""
    for group in on:
        across, up = group.stats[x.name].sd, group.stats[y.name].sd
        if across is not None or up is not None:
            panel.errorbar(
                _at(group, x), _at(group, y), xerr=across, yerr=up, color="C3", linewidth=0.8, alpha=0.35
            )


def _names(panel: Any, on: Sequence[Group], x: Metric, y: Metric) -> None:
    """A number at points of the front, and beside the picture what tells them from one another."""
    ordered = sorted(on, key=lambda group: _at(group, x))
    every = max(1, -(-len(ordered) // NAMED))
    keys = [key for key in ordered[0].row.config if key != "seed"]
    telling = [key for key in keys if len({str(group.row.config.get(key)) for group in ordered}) > 1]
    strategies = {group.row.strategy for group in ordered}
    for number, group in enumerate(ordered[::every], start=1):
        words = [f"{group.row.strategy} {group.row.nodes}×{group.row.processes_per_node}"]
        words = words if len(strategies) > 1 or not telling else []
        words += [f"{key.rpartition('.')[2]} {value(group.row.config.get(key))}" for key in telling]
        panel.annotate(
            str(number),
            (_at(group, x), _at(group, y)),
            xytext=(5, 6),
            textcoords="offset points",
            fontsize=8,
            color="C3",
        )
        panel.plot([], [], " ", label=f"{number}  {', '.join(words)}")


def _at(group: Group, metric: Metric) -> float:
    return group.stats[metric.name].mean


def _label(metric: Metric) -> str:
    name = header(metric.name)
    shown = name if name == metric.name else f"{name} ({metric.name})"
    return f"{shown}, {'larger' if metric.better == 'max' else 'smaller'} is better"
