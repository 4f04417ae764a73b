"""Which plots a sweep's page has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpcdl.report import plots, scale
from hpcdl.report.plots import Axis, Line, Plot
from hpcdl.report.series import number
from hpcdl.runs.compare_metrics import Metric, direction
from hpcdl.runs.compare_metrics import front as metric_front

MOST_KEYS = 6
"""Keys that are drawn: those that take the most values come first."""
MOST_WORDS = 8
"""Values of a key that are no numbers, on an axis."""
_NOT_DRAWN = ("cluster.nodes", "cluster.processes_per_node", "seed")
"""The first two are what the scaling plots are over; a seed has no more or less."""
_FAINT_FROM = 150
"""So many dots lie on each other."""
_ALL_LINES = 20
"""Up to so many runs have a line each."""

Rows = Sequence[Mapping[str, Any]]


def scaling(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tokens/s and efficiency by processes; and the memory that was planned against what was measured."""
    rows: Rows = report["rows"]
    made: list[Plot] = []
    if len({row["processes"] for row in rows}) > 1:
        processes = Axis(label="processes", log=_spread(rows), few=True)
        made.append(
            Plot(
                title="Scaling",
                x=processes,
                y=Axis(label="tokens/s", from_zero=True),
                lines=_groups(rows, "tokens_per_s"),
            )
        )
        made.append(
            Plot(
                title="Scaling efficiency",
                x=processes,
                y=Axis(label="tokens/s a process, over the smallest world's", unit="%", from_zero=True),
                lines=_groups(rows, "efficiency", 100.0),
                levels=[(100.0, "100 %")],
            )
        )
    if (trade := _trade(rows)) is not None:
        made.append(trade)
    both = [row for row in rows if row["planned_peak_bytes"] and row["measured_peak_bytes"]]
    if both:
        made.append(_memory(both))
    return [drawn for plot in made if (drawn := plots.draw(plot)) is not None]


def _trade(rows: Rows) -> Plot | None:
    """Speed against memory, and the points that no other beats in both."""
    having = [row for row in rows if row["tokens_per_s"] is not None and row["peak_memory_bytes"]]
    if len({row["peak_memory_bytes"] for row in having}) < 3:
        return None
    metrics = [Metric(name=name, better=direction(name)) for name in ("tokens_per_s", "peak_memory_bytes")]
    front = [having[place] for place in metric_front(having, metrics)]

    def points(chosen: Rows) -> list[tuple[float, float]]:
        return [(row["peak_memory_bytes"], row["tokens_per_s"]) for row in chosen]

    best = sorted(points(front))
    return Plot(
        title="Speed against memory",
        x=Axis(label="memory, highest of any rank", unit=scale.BYTES, few=True),
        y=Axis(label="tokens/s", from_zero=True),
        lines=[
            Line(label="beaten by none in both", points=best, style="both", colour=2),
            Line(
                label="run",
                points=points(having),
                style="dots",
                faint=len(having) > _FAINT_FROM,
                names=[row["run_id"] for row in having],
            ),
        ],
    )


def _memory(rows: Rows) -> Plot:
    points = [(row["planned_peak_bytes"], row["measured_peak_bytes"]) for row in rows]
    low, high = min(map(min, points)), max(map(max, points))
    return Plot(
        title="Memory, planned and measured",
        x=Axis(label="planned peak", unit=scale.BYTES, few=True),
        y=Axis(label="measured peak of rank 0", unit=scale.BYTES),
        lines=[
            Line(label="as planned", points=[(low, low), (high, high)], colour=0, dashed=True),
            Line(label="run", points=points, style="dots", names=[row["run_id"] for row in rows]),
        ],
    )


def _groups(rows: Rows, key: str, factor: float = 1.0) -> list[Line]:
    """Each run as a dot, and of each strategy the mean as a line."""
    by_strategy: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row[key] is not None:
            by_strategy.setdefault(row["strategy"], []).append(row)
    lines = []
    for place, (strategy, members) in enumerate(sorted(by_strategy.items())):
        colour = place % plots.COLOURS + 1
        dots = sorted((row["processes"], row[key] * factor, row["run_id"]) for row in members)
        lines.append(
            Line(
                label=strategy,
                points=[(x, y) for x, y, _ in dots],
                style="dots",
                colour=colour,
                names=[name for _, _, name in dots],
            )
        )
        means: dict[int, list[float]] = {}
        for row in members:
            means.setdefault(row["processes"], []).append(row[key] * factor)
        line = [(float(x), sum(ys) / len(ys)) for x, ys in sorted(means.items())]
        lines.append(Line(label=f"{strategy}, mean", points=line if len(line) > 1 else [], colour=colour))
    return lines


def by_key(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What came out, against each key that differs."""
    rows: Rows = report["rows"]
    result = next((key for key in ("eval_loss", "loss") if any(row[key] is not None for row in rows)), None)
    wanted = [(result, "held-out loss" if result == "eval_loss" else "loss")] if result else []
    wanted.append(("tokens_per_s", "tokens/s"))
    keys = [key for key in report["differing"] if key not in _NOT_DRAWN]
    made = []
    for metric, label in wanted:
        for key in sorted(keys, key=lambda key: -_values(rows, key))[:MOST_KEYS]:
            if (drawn := _against(rows, key, metric, label)) is not None:
                made.append(drawn)
    return made


def _values(rows: Rows, key: str) -> int:
    return len({str(row["config"].get(key)) for row in rows})


def _against(rows: Rows, key: str, metric: str, label: str) -> dict[str, Any] | None:
    having = [row for row in rows if row[metric] is not None]
    given = [row["config"].get(key) for row in having]
    values = [_number(value) for value in given]
    names: list[str] = []
    if any(value is None for value in values):
        names = sorted({scale.value(value) for value in given})
        if not 2 <= len(names) <= MOST_WORDS:
            return None
        values = [float(names.index(scale.value(value))) for value in given]
    places = [value for value in values if value is not None]
    if len(set(places)) < 2:
        return None
    log = not names and min(places) > 0 and max(places) / min(places) >= 10
    means: dict[float, list[float]] = {}
    for x, row in zip(places, having, strict=True):
        means.setdefault(x, []).append(row[metric])
    mean = [(x, sum(ys) / len(ys)) for x, ys in sorted(means.items())]
    repeated = len(mean) < len(having)
    dots = Line(
        label="run",
        points=[(x, row[metric]) for x, row in zip(places, having, strict=True)],
        style="dots",
        faint=len(having) > _FAINT_FROM,
        names=[row["run_id"] for row in having],
    )
    lines = [dots, Line(label="mean", points=mean, colour=2)] if repeated and len(mean) <= 50 else [dots]
    return plots.draw(
        Plot(
            title=key,
            x=Axis(label=key, log=log, words=names, few=True),
            y=Axis(label=label, from_zero=metric == "tokens_per_s"),
            lines=lines,
        )
    )


def _number(value: Any) -> float | None:
    """A number; also one that YAML takes for a text (`1e-05`)."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return number(value)


def curves(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The loss of all points in one plot."""
    own, shares = report["curves"]["loss"], report["curves"]["shares"]
    rows = {row["run_id"]: row for row in report["rows"]}
    own = sorted(own, key=lambda each: _last(each["points"]))
    lines: list[Line] = []
    if shares:
        lines = [
            Line(
                label="5 to 95 % of all runs",
                points=shares["0.05"],
                upper=shares["0.95"],
                style="band",
                colour=0,
            ),
            Line(label="25 to 75 %", points=shares["0.25"], upper=shares["0.75"], style="band", colour=0),
            Line(label="median", points=shares["0.5"], colour=8),
        ]
    elif len(own) > _ALL_LINES:
        lines = [Line(label="others", points=each["points"], colour=0) for each in own[5:]]
    marked = own[: 5 if shares or len(own) > _ALL_LINES else len(own)]
    for place, each in enumerate(marked):
        label = f"{each['run_id'][:6]} {_told(rows[each['run_id']], report['differing'])}".strip()
        colour = place % (plots.COLOURS - 1) + 1
        lines.append(
            Line(label=label, points=each["points"], colour=colour, dashed=place >= plots.COLOURS - 1)
        )
    note = "in colour: the runs that end lowest" if len(marked) < len(rows) else ""
    x, y = Axis(label="step", unit="step"), Axis(label="loss")
    drawn = plots.draw(Plot(title="Loss", x=x, y=y, lines=lines, note=note))
    if drawn is None:
        return []
    unique = {each["label"]: each for each in drawn["legend"]}
    return [{**drawn, "legend": list(unique.values())}]


def _told(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    """What tells a run from the others, in a few words."""
    parts = [f"{key.rpartition('.')[2]}={scale.value(row['config'].get(key))}" for key in keys[:4]]
    return " ".join(parts)[:60]


def _last(points: Sequence[Sequence[float]]) -> float:
    return points[-1][1] if points else float("inf")


def _spread(rows: Rows) -> bool:
    counts = [row["processes"] for row in rows]
    return bool(min(counts) > 0 and max(counts) / min(counts) >= 8)
