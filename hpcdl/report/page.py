"""The report as text: HTML and Markdown from templates, JSON as it is."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from hpcdl.report import figures, scale, strip, sweep_figures
from hpcdl.report.sweep import OVER_SEEDS
from hpcdl.runs import words

if TYPE_CHECKING:
    from jinja2 import Environment

FORMATS = ("html", "md", "json")
_BARS = "▁▂▃▄▅▆▇█"
_MEANT = re.compile(r"([\\`*_{}\[\]<>|#~])")
"""What Markdown would take for its own."""


def render(report: Mapping[str, Any], form: str) -> str:
    """The report in one of FORMATS.

    Args:
        report: as hpcdl.report.run or hpcdl.report.sweep has it.
        form: of FORMATS.
    """
    if form == "json":
        return json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    kind = str(report["report"])
    if form == "md":
        more = {"columns": columns(report), "over_seeds": over_seeds(report)} if kind == "sweep" else {}
        return _environment(html=False).get_template(f"{kind}.md.j2").render(r=report, **more)
    script, style = _source("page.js"), _source("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment(html=True)
        .get_template(f"{kind}.html.j2")
        .render(r=report, script=script, style=style, script_hash=digest, **_drawings(report))
    )


def _drawings(report: Mapping[str, Any]) -> dict[str, Any]:
    if report["report"] == "sweep":
        return {
            "scaling": sweep_figures.scaling(report),
            "by_key": sweep_figures.by_key(report),
            "curves": sweep_figures.curves(report),
            "rows_by_id": {row["run_id"]: row for row in report["rows"]},
            "best_of": {key: best["run_id"] for key, best in report["best"].items()},
            "columns": columns(report),
            "over_seeds": over_seeds(report),
        }
    return {
        "training": figures.training(report),
        "system": figures.system(report),
        "strip": strip.of_tries(report["tries"]),
    }


def metric(key: str, value: float, report: Mapping[str, Any]) -> str:
    """A figure of a sweep's table."""
    if key in ("loss", "eval_loss"):
        return words.number(value)
    if key == "efficiency":
        return f"{100 * value:.1f} %"
    if key == "cost":
        return hours(value)
    units = {"peak_memory_bytes": scale.BYTES, "step_s": scale.SECONDS}
    return scale.written(value, units.get(key, ""))


def spread(key: str, found: Mapping[str, Any] | None, report: Mapping[str, Any]) -> str:
    """A mean over seeds and its standard deviation."""
    if found is None:
        return "-"
    mean = metric(key, found["mean"], report)
    return mean if found["sd"] is None else f"{mean} ± {metric(key, found['sd'], report)}"


def p_value(p: float) -> str:
    """`p = 0.03`, `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def over_seeds(report: Mapping[str, Any]) -> dict[str, str]:
    """Of the figures that have a mean over seeds, key and heading."""
    names = {key: name for name, key in COLUMNS.items()}
    groups = report["seeds"]["groups"]
    return {key: names[key] for key in OVER_SEEDS if any(key in group["figures"] for group in groups)}


COLUMNS = {
    "tokens/s": "tokens_per_s",
    "step": "step_s",
    "efficiency": "efficiency",
    "memory": "peak_memory_bytes",
    "loss": "loss",
    "held-out loss": "eval_loss",
}


def columns(report: Mapping[str, Any]) -> dict[str, str]:
    """A sweep's columns of what was measured, those that hold nothing left out: heading and key."""
    spent = report["cost"]
    held = "GPU-hours" if spent["gpu_hours"] else "CPU-hours"
    price = held if spent["money"] is None else "price"
    wanted = {**COLUMNS, price: "cost"}
    having = {
        name: key for name, key in wanted.items() if any(row[key] is not None for row in report["rows"])
    }
    if not any(row["baseline"] not in (None, row["run_id"]) for row in report["rows"]):
        having.pop("efficiency", None)  # nothing to hold it against
    return having


@cache
def _environment(*, html: bool) -> Environment:
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("hpcdl.report", "templates"),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.globals.update(metric=metric, spread=spread, p_value=p_value)
    made.filters.update(
        bytes=lambda value: _or_dash(value, scale.BYTES),
        seconds=lambda value: _or_dash(value, scale.SECONDS),
        count=_or_dash,
        percent=lambda value: "-" if value is None else f"{100 * value:.1f} %",
        hours=hours,
        digits=lambda value, count=4: words.number(value, count),
        clock=words.local,
        duration=words.duration,
        between=words.between,
        value=scale.value,
        ranks=rank_ranges,
        size_of=lambda value, most: 0 if not value or not most else round(100 * value / most, 1),
    )
    if not html:
        made.filters.update(md=markdown, code=code, spark=sparkline, fence=fence)
    return made


def _source(name: str) -> str:
    return resources.files("hpcdl.report").joinpath("templates", name).read_text(encoding="utf-8")


def _or_dash(value: float | None, unit: str = "") -> str:
    return "-" if value is None else scale.written(value, unit)


def hours(value: float | None) -> str:
    """Hours of something: `0.0012`, `3.25`, `1,250`."""
    if value is None:
        return "-"
    return (
        f"{value:,.0f}"
        if value >= 1000
        else f"{value:.2f}"
        if value >= 1
        else f"{value:.2g}"
        if value
        else "0"
    )


def rank_ranges(ranks: list[int]) -> str:
    """`0-3, 8`."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][1] == rank - 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in parts)


def markdown(value: object) -> str:
    """A text in a line of Markdown, as it is: nothing in it is taken for markup."""
    return _MEANT.sub(r"\\\1", str(value)).replace("\r", " ").replace("\n", " ")


def code(value: object) -> str:
    """A text in a line of Markdown that is to be copied: as it is, in backticks."""
    text = str(value).replace("\r", " ").replace("\n", " ").replace("|", "\\|")
    ticks = fence(text)[2:] if "`" in text else "`"
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def fence(text: str) -> str:
    """A fence for a block of code that the text can't end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)


def sparkline(points: list[tuple[float, float]], width: int = 40) -> str:
    """A curve in a line of text."""
    if not points:
        return ""
    count = min(width, len(points))
    parts = [points[i * len(points) // count : (i + 1) * len(points) // count] for i in range(count)]
    means = [sum(y for _, y in part) / len(part) for part in parts]
    low, high = min(means), max(means)
    if high <= low:
        return _BARS[0] * count
    return "".join(_BARS[round((mean - low) / (high - low) * (len(_BARS) - 1))] for mean in means)
