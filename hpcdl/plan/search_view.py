"""What a search has found, for people: a table, and speed against memory as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdl.errors import UsageError
from hpcdl.plan import found as words
from hpcdl.plan import units
from hpcdl.plan.found import Found, Judged

if TYPE_CHECKING:
    from rich.console import Console

FRONT = 8
"""Rows of the front, at most: evenly along it."""
NAMED = 6
"""Points of the front that the picture names."""


def show(console: Console, found: Found) -> None:
    """The choice and why, those that it won against, and the front.

    Args:
        console: where to; its width counts.
        found: what was found.
    """
    if found.chosen is None:
        _nothing(console, found)
        return
    chosen = found.chosen
    first = f"{words.name(chosen.choice)}, {words.details(chosen.choice)}"
    for label, text in (
        ("chosen", first),
        ("", f"{_speed(chosen)}; {_room(chosen)}"),
        *(("why" * (not number), reason) for number, reason in enumerate(found.reasons)),
    ):
        _labelled(console, label, text)
    console.print()
    others = [lost.judged for lost in found.runners_up]
    _table(console, "Other meshes, each at its best", [chosen, *others], chosen)
    changes = [lost.judged for lost in found.changes]
    if changes:
        _table(console, "The chosen one with one setting changed", changes, chosen)
    front = words.spread(found.front, FRONT)
    if len(front) > 1:
        _table(console, f"Beaten by none in both speed and memory{_of(front, found.front)}", front, chosen)
    console.print("to type", style="bold")
    for line in _lines(words.overrides(chosen.choice), console.width - 4):
        console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)


def _nothing(console: Console, found: Found) -> None:
    for number, reason in enumerate(found.reasons or ("there is nothing to choose from",)):
        _labelled(console, "none" * (not number), reason)
    for number, remedy in enumerate(found.remedies):
        _labelled(console, "would fit" * (not number), remedy)


def _labelled(console: Console, label: str, text: str) -> None:
    """A paragraph with a word before its first line."""
    from rich.table import Table
    from rich.text import Text

    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_column(width=9)
    line.add_column(overflow="fold")
    line.add_row(Text(label, style="bold"), Text(text))
    console.print(line)


def _speed(judged: Judged) -> str:
    mfu = "" if judged.time.mfu is None else f", MFU {judged.time.mfu:.0%}"
    return f"{units.seconds(judged.step_s)} a step, {judged.time.tokens_per_s:,.0f} tokens/s{mfu}"


def _room(judged: Judged) -> str:
    limit = "" if judged.limit_bytes is None else f" of {units.gib(judged.limit_bytes)}"
    return f"{units.gib(judged.peak_bytes)}{limit} a process"


def _of(shown: Sequence[Judged], all_: Sequence[Judged]) -> str:
    return f" ({len(shown)} of {len(all_)})" if len(shown) < len(all_) else ""


def _table(console: Console, title: str, rows: Sequence[Judged], chosen: Judged) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("mesh", overflow="fold")
    table.add_column("batch", justify="right", no_wrap=True)
    table.add_column("recompute", no_wrap=True)
    table.add_column("more", overflow="fold")
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("peak", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for one in rows:
        choice, why = one.choice, words.why_lost(one, chosen)
        style = "bold" if choice == chosen.choice else ("" if one.fits else "dim")
        recomputed = {"none": "–", "selective": "half", "full": "all"}[choice.checkpointing]
        cells = (
            words.name(choice, ""),
            str(choice.micro_batch_size),
            recomputed,
            ", ".join(words.more(choice)),
            units.seconds(one.step_s),
            units.gib(one.peak_bytes),
            why,
        )
        table.add_row(*(Text(cell) for cell in cells), style=style)
    console.print(table)


def _lines(words_: Sequence[str], width: int) -> list[str]:
    """As a shell takes them: broken between words, a backslash at each end."""
    lines = [""]
    for word in words_:
        if lines[-1] and len(lines[-1]) + len(word) + 3 > width:
            lines[-1] += " \\"
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def draw(found: Found, file: Path) -> None:
    """Step time against memory: every choice that was worked out a mark, the front a line.

    Args:
        found: what was found.
        file: where to: a PNG, SVG or PDF by its ending.

    Raises:
        UsageError: matplotlib is missing, there is nothing to draw, or the file can't be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("a picture needs matplotlib: pip install matplotlib") from error
    if found.chosen is None:
        raise UsageError("nothing was chosen: there is nothing to draw")
    figure = Figure(figsize=(10, 5.5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    _scatter(figure.subplots(), figure, found)
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: can't be written ({error})") from error


def _scatter(panel: Any, figure: Any, found: Found) -> None:
    chosen = found.chosen
    assert chosen is not None
    fit = [one for one in found.others if one.fits]
    large = [one for one in found.others if not one.fits]
    for group, colour, label in ((large, "0.85", "doesn't fit"), (fit, "0.6", "fits")):
        panel.scatter(*_points(group), s=16, color=colour, label=label)
    panel.step(*_points(found.front), where="post", color="C3", linewidth=1.3)
    panel.scatter(*_points(found.front), s=36, color="C3", zorder=3, label="beaten by none")
    panel.scatter(
        *_points([chosen]), s=130, facecolors="none", edgecolors="C0", linewidths=2, zorder=4, label="chosen"
    )
    if found.limit_bytes is not None:
        panel.axhline(found.limit_bytes / units.GIB, color="C1", linestyle="--", linewidth=1)
        panel.annotate(
            f"limit {units.gib(found.limit_bytes)}",
            (1, found.limit_bytes / units.GIB),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="C1",
        )
    _bounds(panel, found)
    for number, one in enumerate(words.spread(found.front, NAMED), start=1):
        at = (one.step_s, one.peak_bytes / units.GIB)
        panel.annotate(str(number), at, xytext=(5, 6), textcoords="offset points", fontsize=8, color="C3")
        panel.plot([], [], " ", label=f"{number}  {words.name(one.choice)}, {_short(one)}")
    panel.set(xlabel="seconds a step", ylabel="GiB a process, at its peak", title=_title(found))
    panel.grid(alpha=0.25, which="both")
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, handlelength=1.2)


def _short(judged: Judged) -> str:
    choice = judged.choice
    recomputed = "" if choice.checkpointing == "none" else f", {choice.checkpointing} ckpt"
    return f"mb {choice.micro_batch_size}{recomputed}"


def _title(found: Found) -> str:
    assert found.chosen is not None
    return f"{words.name(found.chosen.choice)}: {_speed(found.chosen)}"


def _bounds(panel: Any, found: Found) -> None:
    """What is many times too large or too slow would press all others into a corner: it is left outside."""
    near = [*found.front]
    slow = max(one.step_s for one in near)
    high = max(one.peak_bytes for one in near) / units.GIB
    high = max(
        high, (found.limit_bytes or 0) / units.GIB if (found.limit_bytes or 0) < 8 * high * units.GIB else 0
    )
    panel.set_xlim(0.9 * near[0].step_s, 1.1 * slow)
    panel.set_ylim(0, 1.25 * high)
    if slow > 4 * near[0].step_s:
        panel.set_xscale("log")


def _points(judged: Sequence[Judged]) -> tuple[list[float], list[float]]:
    return [one.step_s for one in judged], [one.peak_bytes / units.GIB for one in judged]
