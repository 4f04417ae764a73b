"""A plan to read: memory of each stage with a bar, time, communication, duration and disk; and for scripts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from hpcdl.plan import bar, limits
from hpcdl.plan.records import Plan, RankMemory, StepTime, Traffic
from hpcdl.plan.units import gib, seconds
from hpcdl.spec import ExperimentSpec

if TYPE_CHECKING:
    from rich.console import Console

MOMENTS = {
    "loading": "while weights are read",
    "forward": "at the forward pass's end",
    "loss": "in the loss",
    "backward": "in the backward pass",
    "optimizer": "in the optimizer's step",
}
STYLES: dict[limits.Verdict, str] = {
    "fits": "green",
    "close": "yellow",
    "too big": "bold red",
    "unknown": "yellow",
}
BAR_WIDTH = 100
COLUMNS_SHOWN = 6
"""Stages that the table of bytes has side by side, at most."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A run, and what is planned for it."""

    spec: ExperimentSpec
    plan: Plan
    label: str = ""
    """What tells it from the other points of its sweep."""
    start: str = ""
    """When it would start, in words; empty where nobody was asked."""
    start_time: str | None = None
    """The same, ISO 8601; None: not known."""

    @property
    def gpu_hours(self) -> float | None:
        """None without GPUs, or where the duration isn't known."""
        if self.plan.run_s is None or self.plan.hardware.device.kind != "cuda":
            return None
        return self.plan.world_size * self.plan.run_s / 3600

    @property
    def cpu_hours(self) -> float | None:
        """Of the CPUs that are asked for."""
        if self.plan.run_s is None:
            return None
        return self.spec.cluster.nodes * self.spec.cluster.cpus_per_node * self.plan.run_s / 3600


# --- for scripts ----------------------------------------------------------------------------------------------


def as_json(shown: Shown) -> dict[str, Any]:
    """Everything; bytes and seconds."""
    plan = shown.plan
    peak = plan.peak
    return {
        "name": shown.spec.name,
        "overrides": shown.label,
        "world_size": plan.world_size,
        "fits": plan.fits,
        "verdict": limits.verdict(plan),
        "peak_bytes": peak and peak.peak,
        "limit_bytes": plan.hardware.device.memory_bytes,
        "stages": None if plan.memory is None else [_rank(rank) for rank in plan.memory],
        "time": None if plan.time is None else _time(plan.time),
        "max_steps": plan.max_steps,
        "run_s": plan.run_s,
        "gpu_hours": shown.gpu_hours,
        "cpu_hours": shown.cpu_hours,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "checkpoints": plan.checkpoints,
        "disk_bytes": _disk(plan),
        "start": shown.start_time,
        "start_said": shown.start,
        "unknown": list(plan.unknown),
        "hardware": dataclasses.asdict(plan.hardware),
    }


def _rank(rank: RankMemory) -> dict[str, Any]:
    return {**dataclasses.asdict(rank), "peak": rank.peak}


def _time(step: StepTime) -> dict[str, Any]:
    return {**dataclasses.asdict(step), "step_s": step.step_s, "tokens_per_s": step.tokens_per_s}


def _disk(plan: Plan) -> int | None:
    return None if plan.checkpoint_bytes is None else plan.checkpoint_bytes * plan.checkpoints


# --- to read --------------------------------------------------------------------------------------------------


def show(console: Console, shown: Shown) -> None:
    """One run's plan.

    Args:
        console: where to; its width counts.
        shown: what is planned.
    """
    from rich.text import Text

    plan = shown.plan
    console.print(Text.assemble((shown.spec.name, "bold"), "  ", _what(shown)))
    console.print()
    judged = limits.verdict(plan)
    console.print(Text.assemble(("memory  ", "bold"), (limits.fits_in_words(plan), STYLES[judged])))
    if plan.memory:
        _print_memory(console, plan)
    fields = list(_fields(shown))
    if fields:
        console.print()
        _print_fields(console, fields)
    if plan.time is not None and plan.time.traffic:
        console.print()
        _print_traffic(console, plan.time.traffic)
    console.print()
    console.print(Text.assemble(("planned for  ", "bold"), _machine(plan)))
    _print_fields(console, list(plan.hardware.sources.items()))
    for line in plan.unknown:
        console.print(Text(f"unknown: {line}", style="yellow"))


def _what(shown: Shown) -> str:
    spec, cluster = shown.spec, shown.spec.cluster
    degrees = [
        f"{key} {value}"
        for key in ("dp_shard", "tp", "cp", "pp")
        if (value := getattr(spec.parallel, key)) > 1
    ]
    parts = [
        spec.model.name,
        " ".join([spec.parallel.name, *degrees]),
        spec.trainer.precision,
        *(name for name in (spec.peft.name, spec.quant.scheme) if name != "none"),
        f"{cluster.nodes} node{'s' * (cluster.nodes > 1)} × {cluster.processes_per_node}",
        f"batch {spec.trainer.global_batch_size} × {spec.data.seq_len}",
    ]
    return ", ".join(parts)


def _machine(plan: Plan) -> str:
    hardware = plan.hardware
    return f"{hardware.nodes} × {hardware.ranks_per_node} × {hardware.device.name}"


def groups(ranks: Sequence[RankMemory]) -> list[tuple[str, RankMemory]]:
    """Stages that hold the same, together: `stage 0`, `stages 1-6`; with one stage only, no name."""
    found: list[tuple[list[int], RankMemory]] = []
    for rank in ranks:
        alike = dataclasses.replace(rank, stage=found[-1][1].stage) if found else rank
        if found and alike == found[-1][1]:
            found[-1][0].append(rank.stage)
        else:
            found.append(([rank.stage], rank))
    if len(found) <= 1:
        return [("", rank) for _, rank in found]
    return [(f"stage {a[0]}" if len(a) == 1 else f"stages {a[0]}-{a[-1]}", rank) for a, rank in found]


def _print_memory(console: Console, plan: Plan) -> None:
    assert plan.memory is not None
    stages = groups(plan.memory)
    shown = _few(stages, plan)
    limit = plan.hardware.device.memory_bytes
    _print_bytes(console, shown)
    if len(shown) < len(stages):
        console.print(f"{len(stages) - len(shown)} more stages between these: --json has them", style="dim")
    console.print()
    names = max(len(name) for name, _ in shown)
    width = min(console.width, BAR_WIDTH) - names - (2 if names else 0) - 1
    for name, rank in shown:
        line = bar.bar(rank, limit, width, bar.scale(plan))
        console.print(f"{name:<{names}}  " if names else "", line, sep="", no_wrap=True, overflow="crop")
    console.print(bar.legend([rank for _, rank in shown], min(console.width, BAR_WIDTH)))


def _few(stages: list[tuple[str, RankMemory]], plan: Plan) -> list[tuple[str, RankMemory]]:
    """As many stages as a table has room for: the first ones, the fullest, the last."""
    if len(stages) <= COLUMNS_SHOWN:
        return stages
    fullest = max(range(len(stages)), key=lambda place: stages[place][1].peak)
    kept = sorted({0, 1, 2, fullest, len(stages) - 2, len(stages) - 1})
    return [stages[place] for place in kept]


def _print_bytes(console: Console, stages: Sequence[tuple[str, RankMemory]]) -> None:
    """Categories down, stages across: at the peak; of a single stage also each category's own highest."""
    from rich.text import Text

    single = len(stages) == 1
    held = [name for _, rank in stages for name in bar.at_peak(rank)]
    own = [name for name, size in stages[0][1].bytes.items() if size] if single else []
    names = bar.ordered([*held, *own])
    grid = _grid(
        ["a process's", "at the peak", "at most"] if single else ["at the peak", *(n for n, _ in stages)]
    )
    for name in names:
        sizes = [bar.at_peak(rank).get(name, 0) for _, rank in stages]
        most = [stages[0][1].bytes.get(name, sizes[0])] if single else []
        grid.add_row(name, *(_amount(size) for size in (*sizes, *most)))
    blank = [""] * single
    grid.add_row(Text("peak", style="bold"), *(Text(gib(r.peak), style="bold") for _, r in stages), *blank)
    grid.add_row("ranks", *(str(rank.ranks) for _, rank in stages), *blank)
    console.print(grid)
    when = list({MOMENTS.get(rank.moment, rank.moment): None for _, rank in stages})
    console.print(f"the peak is {', or '.join(when)}", style="dim", highlight=False)


def _amount(size: float) -> str:
    if not size:
        return "-"
    if size < 1024:
        return f"{size:.0f} B"
    return gib(size) if size >= 2**20 else f"{size / 1024:.0f} KiB"


def _grid(header: Sequence[str]) -> Any:
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    for place, name in enumerate(header):
        justify: Literal["right", "left"] = "right" if place else "left"
        grid.add_column(name, justify=justify, no_wrap=True, overflow="ellipsis")
    return grid


def _fields(shown: Shown) -> Iterator[tuple[str, str]]:
    plan, step = shown.plan, shown.plan.time
    if step is not None:
        mfu = f", MFU {100 * step.mfu:.1f} %" if step.mfu is not None else ""
        yield "step", f"{seconds(step.step_s)}, {step.tokens_per_s:,.0f} tokens/s{mfu}"
        yield "of it", ", ".join(f"{name} {seconds(value)}" for name, value in _parts(step) if value)
    if plan.run_s is not None:
        hours = [(shown.gpu_hours, "GPU-hours"), (shown.cpu_hours, "CPU-hours")]
        used = ", ".join(f"{value:,.3g} {name}" for value, name in hours if value is not None)
        yield "run", f"{plan.max_steps} steps in about {limits.duration(plan.run_s)}: {used}"
        limit = shown.spec.cluster.time_min
        if shown.spec.cluster.kind == "slurm" and limit and plan.run_s > 60 * limit:
            yield (
                "",
                f"longer than its time limit of {limit} min: it will go on in {_jobs(plan.run_s, limit)}",
            )
    if plan.checkpoint_bytes is not None:
        whole = f"{_amount(plan.checkpoint_bytes)} a checkpoint"
        count = plan.checkpoints
        yield "disk", whole if count == 1 else f"{whole}, {count} at once: {_amount(_disk(plan) or 0)}"
    if shown.start:
        yield "start", shown.start


def _jobs(run_s: float, limit_min: int) -> str:
    return f"{-(-run_s // (60 * limit_min)):.0f} jobs or more"


def _parts(step: StepTime) -> Iterator[tuple[str, float]]:
    yield "computing", step.compute_s
    yield "memory", step.memory_s
    yield "communication", step.communication_s
    yield "bubble", step.bubble_s
    yield "optimizer", step.optimizer_s
    yield "overhead", step.overhead_s


def _print_traffic(console: Console, traffic: Sequence[Traffic]) -> None:
    grid = _grid(["communication of a step", "ranks", "calls", "sent", "takes", "hidden"])
    for each in traffic:
        hidden = f"{100 * each.hidden / each.seconds:.0f} %" if each.seconds else "-"
        name = f"{each.what} ({each.dimension})"
        cells = (str(each.ranks), f"{each.calls:,.4g}", _amount(each.bytes), seconds(each.seconds), hidden)
        grid.add_row(name, *cells)
    console.print(grid)


def _print_fields(console: Console, fields: Sequence[tuple[str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    for label, text in fields:
        grid.add_row(Text(f"{label:<7}", style="dim"), Text(text, overflow="fold"))
    console.print(grid)


def show_many(console: Console, shown: Sequence[Shown]) -> None:
    """The points of a sweep, a line each, as they were given."""
    from rich.text import Text

    grid = _grid(["point", "peak", "of", "fits", "step", "tokens/s", "run"])
    for each in shown:
        plan, step = each.plan, each.plan.time
        limit, judged = plan.hardware.device.memory_bytes, limits.verdict(plan)
        grid.add_row(
            Text(each.label or each.spec.name),
            gib(plan.peak.peak) if plan.peak else "?",
            gib(limit) if limit is not None else "?",
            Text(
                {"fits": "yes", "close": "maybe", "too big": "no", "unknown": "?"}[judged],
                style=STYLES[judged],
            ),
            seconds(step.step_s) if step else "?",
            f"{step.tokens_per_s:,.0f}" if step else "?",
            limits.duration(plan.run_s) if plan.run_s is not None else "?",
        )
    console.print(grid)
    for line in dict.fromkeys(line for each in shown for line in each.plan.unknown):
        console.print(Text(f"unknown: {line}", style="yellow"))
    starts = {each.start: None for each in shown if each.start}
    for start in starts:
        console.print(Text.assemble(("start   ", "dim"), start))


def picture(shown: Sequence[Shown]) -> tuple[list[tuple[str, RankMemory]], int | None, str]:
    """What bar.draw takes: of one run a bar for each stage, of several one for each point's fullest stage."""
    limits_ = {each.plan.hardware.device.memory_bytes for each in shown}
    limit = limits_.pop() if len(limits_) == 1 else None
    if len(shown) == 1:
        only = shown[0]
        return groups(only.plan.memory or ()), limit, f"{only.spec.name}: {_what(only)}"
    rows = [(each.label, each.plan.peak) for each in shown]
    return [(label, peak) for label, peak in rows if peak is not None], limit, shown[0].spec.name
