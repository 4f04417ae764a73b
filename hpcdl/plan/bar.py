"""Where the bytes of a rank go, as a stacked bar: in a terminal, and as a picture.

In the terminal each category has a letter, so that the bar can be read without colours; colours only make it quicker.
matplotlib is imported here only when a picture is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdl.errors import UsageError
from hpcdl.plan.records import Plan, RankMemory
from hpcdl.plan.units import gib

if TYPE_CHECKING:
    from rich.text import Text

FORMATS = (".png", ".svg", ".pdf")
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """How one category looks."""

    name: str
    letter: str
    color: str
    """Of rich, and of matplotlib as `xterm` has it."""
    hex: str


PARTS = (
    Part(name="weights", letter="W", color="blue", hex="#4878cf"),
    Part(name="adapters", letter="A", color="cyan", hex="#56b4c4"),
    Part(name="gradients", letter="G", color="magenta", hex="#b47cc7"),
    Part(name="optimizer", letter="O", color="red", hex="#d65f5f"),
    Part(name="activations", letter="a", color="green", hex="#6acc65"),
    Part(name="recomputed", letter="r", color="bright_green", hex="#a8dba5"),
    Part(name="logits", letter="l", color="yellow", hex="#c4ad66"),
    Part(name="buffers", letter="b", color="bright_blue", hex="#92c6ff"),
    Part(name="temporary", letter="t", color="bright_yellow", hex="#e0cf8f"),
    Part(name="allocator", letter="x", color="bright_black", hex="#999999"),
    Part(name="runtime", letter="p", color="white", hex="#cccccc"),
)
"""hpcdl.plan.memory.CATEGORIES and what lies beside tensors, in the order in which they are stacked."""


def at_peak(rank: RankMemory) -> dict[str, int]:
    """What adds up to the peak, in the order of the bar; what memory.py names and PARTS doesn't, last."""
    held = {**rank.at_peak, "allocator": rank.allocator, "runtime": rank.runtime}
    return {name: held[name] for name in ordered(held) if held[name]}


def ordered(names: Iterable[str]) -> list[str]:
    """Each once, in the order of the bar."""
    known = [part.name for part in PARTS]
    once = dict.fromkeys(names)
    return [*(name for name in known if name in once), *(name for name in once if name not in known)]


def part(name: str) -> Part:
    """How a category looks; one that PARTS doesn't name has its first letter."""
    found = next((each for each in PARTS if each.name == name), None)
    return found or Part(name=name, letter=name[:1].upper(), color="white", hex="#dddddd")


def cells(sizes: Sequence[int], width: int, whole: int) -> list[int]:
    """How many of `width` characters each size gets of a bar that stands for `whole`: rounded at the edges, so that
    their sum is right to one character.
    """
    edges, so_far = [0], 0
    for size in sizes:
        so_far += size
        edges.append(round(width * so_far / whole))
    return [after - before for before, after in itertools.pairwise(edges)]


def bar(rank: RankMemory, limit: int | None, width: int, most: int) -> Text:
    """One stage's bar: a letter of each category for its share, dots for what is free, a stroke at the limit.

    Args:
        rank: the stage.
        limit: bytes that it may have; None: nobody has said.
        width: characters.
        most: bytes that the whole width stands for: the limit, or the highest peak of all stages.
    """
    from rich.text import Text

    held = at_peak(rank)
    text = Text()
    for name, count in zip(held, cells(list(held.values()), width, most), strict=True):
        look = part(name)
        text.append(look.letter * count, style=f"black on {look.color}")
    text.append("." * (width - len(text)), style="dim")
    if limit is None:
        return text
    place = min(width, round(width * limit / most))
    return Text.assemble(text[:place], ("|", "bold red" if rank.peak > limit else "bold"), text[place:])


def scale(plan: Plan) -> int:
    """Bytes that a bar's whole width stands for."""
    peak = plan.peak.peak if plan.peak else 0
    return max(peak, plan.hardware.device.memory_bytes or 0, 1)


def legend(ranks: Sequence[RankMemory], width: int) -> Text:
    """Which letter is what, for those that a bar has; a letter and its word stay on one line."""
    from rich.text import Text

    seen = ordered(name for rank in ranks for name in at_peak(rank))
    entries = [(look.letter, f"black on {look.color}", look.name) for look in (part(name) for name in seen)]
    text, used = Text(), 0
    for letter, style, name in (*entries, (".", "dim", "free")):
        size = len(letter) + 1 + len(name)
        if used and used + 2 + size > width:
            text.append("\n")
            used = 0
        gap = 2 * (used > 0)
        text.append(" " * gap)
        text.append(letter, style=style)
        text.append(f" {name}")
        used += gap + size
    return text


# --- as a picture ---------------------------------------------------------------------------------------------


def check_name(file: Path) -> Path:
    """The file, if a picture can have this name.

    Raises:
        UsageError: its ending names no format.
    """
    if file.suffix not in FORMATS:
        raise UsageError(f"--png {file}: a picture ends in {', '.join(FORMATS)}")
    return file


def draw(rows: Sequence[tuple[str, RankMemory]], limit: int | None, title: str, file: Path) -> None:
    """Writes the bars of several stages, or of several runs, one below the other.

    Args:
        rows: what stands before each bar, and its bytes.
        limit: a line for what there is; None: none.
        title: above them.
        file: where to.

    Raises:
        UsageError: matplotlib is missing, nothing is known, or the file can't be written.
    """
    if not rows:
        raise UsageError("--png: the memory of none of these runs is known, there is nothing to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("--png needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(10, 1.9 + 0.42 * len(rows)), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    _bars(panel, rows)
    if limit is not None:
        panel.axvline(limit / GIB, color="#c0392b", linewidth=1.6)
        panel.annotate(
            f"{gib(limit)} there", (limit / GIB, 1), (3, 3), xycoords=("data", "axes fraction"),
            textcoords="offset points", color="#c0392b", fontsize=9,
        )  # fmt: skip
    panel.set_xlim(0, 1.12 * max([*(rank.peak for _, rank in rows), limit or 0]) / GIB)
    panel.set_xlabel("GiB of a process at its peak")
    panel.set_title(title, loc="left", fontsize=11, pad=16)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    try:
        figure.savefig(file)
    except OSError as error:
        raise UsageError(f"{file}: can't be written ({error.strerror})") from error


def _bars(panel: Any, rows: Sequence[tuple[str, RankMemory]]) -> None:
    places = list(range(len(rows)))
    left = [0.0] * len(rows)
    names = ordered(name for _, rank in rows for name in at_peak(rank))
    for look in (part(name) for name in names):
        sizes = [at_peak(rank).get(look.name, 0) / GIB for _, rank in rows]
        panel.barh(places, sizes, left=left, color=look.hex, height=0.7, label=look.name)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for place, (_, rank) in zip(places, rows, strict=True):
        panel.annotate(
            gib(rank.peak),
            (rank.peak / GIB, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    panel.set_yticks(places, [name for name, _ in rows])
    panel.invert_yaxis()
