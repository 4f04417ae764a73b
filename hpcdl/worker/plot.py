"""loss.png, reward.png: what was trained on over steps, with the held-out value at each evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAIN, SMOOTH, HELDOUT, GREY = "#9db8d9", "#1f5fa8", "#d1495b", "#5b6470"
SMOOTHING = 0.9
"""Weight of the past in the running mean; it is drawn from 20 points on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Two curves over steps: what was trained on, and what wasn't."""

    taken: Sequence[tuple[int, float]]
    """Of each logged step."""
    heldout: Sequence[tuple[int, float]]
    """Of each evaluation."""
    title: str
    label: str
    """Of the values."""
    names: tuple[str, str] = ("training batch", "held out")
    digits: int = 3
    """After the point, of the first and the last evaluation."""


def draw_loss(metrics: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draws the losses of metrics.jsonl's lines into a PNG."""
    train = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    heldout = [(m["step"], m["eval_loss"]) for m in metrics if "eval_loss" in m]
    draw_curves(Curves(taken=train, heldout=heldout, title=title, label="loss a token (nats)"), path)


def draw_curves(curves: Curves, path: Path) -> None:
    """Draws them into a PNG; no display, no pyplot state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator

    train, heldout = curves.taken, curves.heldout
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = [s for s, _ in train], [v for _, v in train]
    long = len(train) >= 20
    axes.plot(steps, losses, color=TRAIN if long else SMOOTH, linewidth=1.4, label=curves.names[0])
    if long:
        axes.plot(steps, smooth(losses), color=SMOOTH, linewidth=2.0, label="running mean")
    xs, ys = [s for s, _ in heldout], [v for _, v in heldout]
    axes.plot(
        xs, ys, color=HELDOUT, linewidth=1.2, linestyle="--", marker="o", markersize=6, label=curves.names[1]
    )
    for index in {0, len(heldout) - 1} if heldout else set():
        step, value = heldout[index]
        axes.annotate(
            f"{value:.{curves.digits}f}", (step, value), textcoords="offset points", color=HELDOUT, fontsize=9,
            fontweight="bold", xytext=(8 if index == 0 else -8, 9), ha="left" if index == 0 else "right",
            path_effects=[withStroke(linewidth=3, foreground="white")],  # readable where it lies on a curve
        )  # fmt: skip
    axes.set_title(curves.title, loc="left", fontsize=11, fontweight="bold", color="#222222", pad=10)
    axes.set_xlabel("step", color=GREY)
    axes.set_ylabel(curves.label, color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02, y=0.12)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.tick_params(colors=GREY, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9ced6")
    axes.legend(frameon=False, fontsize=9, labelcolor="#333333")
    figure.savefig(path)


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential running mean without the start's bias (as Adam corrects its moments)."""
    mean, smoothed = 0.0, []
    for count, value in enumerate(values, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        smoothed.append(mean / (1 - SMOOTHING**count))
    return smoothed
