"""What a run will take, planned, and what it takes, measured: how far apart?

Each point is a small experiment that goes through hpcdl's own worker to its end, some steps long. What is planned
(hpcdl.plan.memory.ranks, no torch) is held against what was measured on every rank:

tensors    the most bytes of tensors at once in a training step: hpcdl.worker.storages counts every storage
process    the most memory that the process ever had (VmHWM), loading, evaluation, checkpoint and result included:
           against tensors, allocator and runtime together
--gpu      torch.cuda.max_memory_allocated against tensors, max_memory_reserved against tensors and allocator

A point's error is that of its worst rank. A false «fits»: memory as large as the process really took, less one byte,
can't hold the run; a plan below what was measured would have called it fitting. `margin` is how far the plan was above.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _markers import put
from _planner_measure import Measured, measure
from _planner_points import GRID, Point, drawn
from _results import leave

from hpcdl.plan import memory
from hpcdl.plan.records import RankMemory

GOALS = {"one process": (0.05, 0.20), "sharded": (0.10, 0.20)}
"""Median and worst error."""
PADDED = "padded (a bound)"
"""Rows that end before seq_len: how many tokens a batch has is the data's to say, and the plan takes full rows. So
these are held to no false «fits» alone."""
SHOWN = 12
"""Points that the docs show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A point, planned and measured."""

    point: Point
    tensors: tuple[int, int]
    """Planned and measured, of the rank where they are furthest apart."""
    process: tuple[int, int]
    """Planned and measured, of the rank where least is left."""
    planned: dict[str, int]
    """By category, of the rank of `tensors`."""
    measured: dict[str, Any]
    """The same rank's."""
    at_peak: dict[str, int]
    """Planned, at its highest moment."""
    moment: str
    """Planned: when that is."""

    @property
    def group(self) -> str:
        if self.point.settings.get("data__packing") is False:
            return PADDED
        return "one process" if self.point.ranks == 1 else "sharded"

    @property
    def off(self) -> float:
        """The error in tensors."""
        return error(self.tensors)


def error(pair: tuple[int, int]) -> float:
    """Of planned and measured; below 0 where too little was planned."""
    return pair[0] / pair[1] - 1


def tensors(plan: RankMemory, found: dict[str, Any]) -> tuple[int, int]:
    """Planned and measured bytes of tensors."""
    return plan.tensors, found["cuda_peak"] or found["tensors"]


def whole(plan: RankMemory, found: dict[str, Any]) -> tuple[int, int]:
    """All of the process on a CPU; on a GPU what its allocator has reserved: the context isn't torch's to tell."""
    if found["cuda_peak"] is None:
        return plan.peak, found["rss_peak"]
    return plan.tensors + plan.allocator, found["reserved"]


def judged(point: Point, ranks: Measured) -> Row | str:
    """What was planned beside what was measured; why nothing was planned."""
    plans = memory.ranks(point.spec, ranks[0]["device"], point.ranks)
    if plans is None:
        return memory.why_unknown(point.spec) or "no plan, and nobody says why"
    each = [plan for plan in plans for _ in range(plan.ranks)]
    assert len(each) == point.ranks, f"{point.name}: planned for {len(each)} ranks"
    pairs = list(zip(each, ranks, strict=True))
    plan, found = max(pairs, key=lambda pair: abs(error(tensors(*pair))))
    process = [whole(plan, found) for plan, found in pairs]
    return Row(
        point=point, tensors=tensors(plan, found), process=min(process, key=error),
        planned=plan.bytes, measured=found, at_peak=plan.at_peak, moment=plan.moment,
    )  # fmt: skip


# --- what is told -----------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Every point, the worst first."""
    lines = [f"{'point':<66} {'tensors, MiB':>17} {'off by':>7}   {'process, MiB':>13} {'margin':>7}  at"]
    for row in by_error(rows):
        (plan, found), (peak, rss) = row.tensors, row.process
        lines.append(
            f"{row.point.name:<66} {plan / 2**20:8.1f} {found / 2**20:8.1f} {row.off:+7.1%}"
            f"   {peak / 2**20:6.0f} {rss / 2**20:6.0f} {error(row.process):+7.1%}  {row.moment}"
        )
    return "\n".join(lines)


def parts(row: Row) -> str:
    """Where a point's error is: its categories, planned and measured, each at its own highest and at the peak."""
    lines = [f"{row.point.name}  ({row.moment})"]
    for name in memory.CATEGORIES:
        plan, found = row.planned.get(name, 0), row.measured.get(name, 0)
        then = row.measured["at_peak"].get(name, found)
        if max(plan, found) > 0.01 * row.tensors[1]:
            here = row.at_peak.get(name, 0)
            lines.append(
                f"    {name:<12} {plan / 2**20:8.2f} {found / 2**20:8.2f} MiB"
                f"   at the peak {here / 2**20:8.2f} {then / 2**20:8.2f}"
            )
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> list[str]:
    """Median, worst and false fits: of each group and each strategy."""
    lines = [
        f"{'':<16} {'points':>6} {'median':>7} {'worst':>7} {'lowest':>7}   process: margin, least, false fits"
    ]
    for name, chosen in groups(rows).items():
        middle, worst, lowest = figures(chosen)
        margins = [error(row.process) for row in chosen]
        false, least, usual = sum(each < 0 for each in margins), min(margins), statistics.median(margins)
        lines.append(
            f"{name:<16} {len(chosen):>6} {middle:>7.1%} {worst:>7.1%} {lowest:>+7.1%}"
            f"   {usual:+.1%}, {least:+.1%}, {false}"
        )
    return lines


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """One process, sharded, and of the sharded each strategy; those left out that have no point."""
    found = {name: [row for row in rows if row.group == name] for name in (*GOALS, PADDED)}
    for name in sorted({row.point.strategy for row in found["sharded"]}):
        found[f"  {name}"] = [row for row in found["sharded"] if row.point.strategy == name]
    return {name: chosen for name, chosen in found.items() if chosen}


def by_error(rows: Sequence[Row]) -> list[Row]:
    """Those furthest off in tensors first."""
    return sorted(rows, key=lambda row: -abs(row.off))


def figures(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Median and worst error in tensors, and the lowest one."""
    errors = [row.off for row in rows]
    sizes = [abs(each) for each in errors]
    return statistics.median(sizes), max(sizes), min(errors)


def missed(rows: Sequence[Row]) -> list[str]:
    """Bounds that aren't kept."""
    found = []
    for name, (middle, worst) in GOALS.items():
        chosen = [row for row in rows if row.group == name]
        if not chosen:
            continue
        of_median, of_worst, _ = figures(chosen)
        if of_median > middle:
            found.append(f"{name}: median error {of_median:.1%}, the bound is {middle:.0%}")
        if of_worst > worst:
            found.append(f"{name}: worst error {of_worst:.1%}, the bound is {worst:.0%}")
    for row in rows:
        if row.process[0] < row.process[1]:
            short = (row.process[1] - row.process[0]) / 2**20
            found.append(f"{row.point.name}: a false «fits», {short:.1f} MiB too little")
    return found


# --- for the docs ---------------------------------------------------------------------------------------------


def page(rows: Sequence[Row]) -> str:
    """The summary and the worst points as Markdown."""
    lines = [
        "| | points | median | worst | lowest | false «fits» | least margin of the process |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, chosen in groups(rows).items():
        middle, worst, lowest = figures(chosen)
        margins = [error(row.process) for row in chosen]
        lines.append(
            f"| {name.strip()} | {len(chosen)} | {middle:.1%} | {worst:.1%} | {lowest:+.1%}"
            f" | {sum(margin < 0 for margin in margins)} | {min(margins):+.1%} |"
        )
    lines += [
        "",
        "| furthest off | tensors planned | measured | | process planned | measured | |",
        f"|{'---|' * 7}",
    ]
    for row in by_error(rows)[:SHOWN]:
        (plan, found), (peak, rss) = row.tensors, row.process
        lines.append(
            f"| {row.point.name} | {plan / 2**20:.1f} MiB | {found / 2**20:.1f} | {row.off:+.1%}"
            f" | {peak / 2**20:.0f} MiB | {rss / 2**20:.0f} | {error(row.process):+.1%} |"
        )
    return "\n".join(lines)


# --- the command ------------------------------------------------------------------------------------------


def main() -> int:
    options = arguments()
    if options.again:
        kept = json.loads(options.again.read_text())
        found = [(Point(**each["point"]), each["ranks"]) for each in kept]
        found = [(point, ranks) for point, ranks in found if options.only in point.name]
        failed: list[str] = []
    else:
        wide = (point.wider(options.scale) for point in GRID)
        chosen = drawn(options.seed, options.points) if options.held_out else wide
        points = tuple(longer(point, options.steps) for point in chosen)
        points = on_gpus(points) if options.gpu else points
        points = tuple(point for point in points if options.only in point.name)
        found, failed = run(points, options)
    rows, unknown = [], []
    for point, ranks in found:
        row = judged(point, ranks)
        if isinstance(row, str):
            unknown.append(f"{point.name}: NOT PLANNED: {row}")
        else:
            rows.append(row)
    print(told(rows, options.parts))
    if options.write and rows:
        kind = "held out" if options.held_out else "grid"
        begin = f"<!-- truth, {kind}: begin (benchmarks/planner.py) -->"
        put(options.write, page(rows), begin, f"<!-- truth, {kind}: end -->")
    problems = [*missed(rows), *failed, *unknown]
    for problem in problems:
        print(f"MISSED  {problem}")
    leave(
        [asdict(row) for row in rows],
        [("errors, and what doesn't fit, within docs/planner.md's", not problems)],
    )
    return 1 if problems or not rows else 0


def longer(point: Point, steps: int) -> Point:
    return replace(point, settings={**point.settings, "trainer__max_steps": steps})


def on_gpus(points: Sequence[Point]) -> tuple[Point, ...]:
    """Those that this machine's GPUs are enough for, a GPU a rank."""
    count = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    done = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True)
    have = int(done.stdout)
    if not have:
        sys.exit("--gpu: torch sees no GPU here")
    asked = ((point, {**point.settings, "cluster__gpus_per_node": point.ranks}) for point in points)
    return tuple(
        replace(point, settings=settings)
        for point, settings in asked
        if point.ranks <= have and point.strategy != "hogwild"
    )


def told(rows: Sequence[Row], in_parts: int) -> str:
    """All of it as text."""
    if not rows:
        return "nothing was measured"
    worst = by_error(rows)[:in_parts]
    pieces = [table(rows), "", *summary(rows)]
    if worst:
        pieces += ["", "planned, measured", *(parts(row) for row in worst)]
    return "\n".join(pieces)


def run(
    points: Sequence[Point], options: argparse.Namespace
) -> tuple[list[tuple[Point, Measured]], list[str]]:
    """Measures; keeps what there is in --json after each point."""
    found: list[tuple[Point, Measured]] = []
    failed: list[str] = []
    begun = time.monotonic()

    def done(point: Point, ranks: Measured | str) -> None:
        words = (
            f"[{len(found) + len(failed) + 1}/{len(points)}, {time.monotonic() - begun:.0f} s] {point.name}"
        )
        if isinstance(ranks, str):
            failed.append(f"{point.name}: NOT MEASURED: {ranks.strip().splitlines()[-1]}")
            print(f"{words}: failed\n{ranks}", file=sys.stderr)
            return
        found.append((point, ranks))
        print(words, file=sys.stderr, flush=True)
        if options.json:
            kept = [{"point": asdict(each), "ranks": of} for each, of in found]
            options.json.write_text(json.dumps(kept, indent=1))

    with tempfile.TemporaryDirectory(prefix="planner-") as folder:
        measure(points, Path(folder), options.at_once, done, results=not options.no_result)
    return found, failed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="WORD", help="points whose name has it")
    parser.add_argument("--held-out", action="store_true", help="points drawn by chance instead of the grid")
    parser.add_argument("--seed", type=int, default=0, help="which of them")
    parser.add_argument("--points", type=int, default=40, help="how many of them")
    parser.add_argument("--at-once", type=int, default=2, help="points at a time")
    parser.add_argument(
        "--gpu", action="store_true", help="on this machine's GPUs, with what torch allocates"
    )
    parser.add_argument(
        "--scale", type=int, default=2, help="how much wider than in the file the grid's models are"
    )
    parser.add_argument("--steps", type=int, default=8, help="of each run: processes grow for some")
    parser.add_argument(
        "--no-result",
        action="store_true",
        help="runs leave no result: quicker, and the process's peak without it",
    )
    parser.add_argument("--parts", type=int, default=0, metavar="N", help="show the N worst by category")
    parser.add_argument("--json", type=Path, help="keep what was measured")
    parser.add_argument(
        "--again", type=Path, metavar="JSON", help="plan again what --json has kept; measure nothing"
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE.md", help="put the summary between this file's markers"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
