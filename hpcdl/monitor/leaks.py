"""Does a process leak? A verdict on memory against steps: how many bytes a step, how sure, and when it will be full.

A leak is growth that doesn't end: the *floor* (what is left between evaluations, checkpoints and collections of
garbage) rises in many small steps, never gives back much, and is as fast lately as before. What looks like it and is
none fails at least one of these:

    warm-up                         is left out: the first tenth; or, where that was not all of it, the first half
    evaluations, checkpoints        not in the floor: samples of other phases are left out, blocks' low quantiles taken
    saw-tooth of an allocator       falls again by more than a third of what it has grown
    caches that fill, fragmentation flatten: the last third is slower than the middle one
    buffers that double, stages     a few large jumps make all of the growth
    mapped files                    are not counted at all (`ProcessSample.file_bytes`)

It can't tell a bounded thing from an unbounded one before the bound is reached: see `hpcdl.monitor.watching` for how
long an agent waits for it. Nor does it see a leak of less than a MiB in all, one that happens fewer than about six
times, or one that began in the latter half of what was seen. Slope and interval: hpcdl.monitor.trend.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hpcdl.monitor import records
from hpcdl.monitor.records import NodeSample
from hpcdl.monitor.series import Gathered, Series, Who
from hpcdl.monitor.trend import Point, Trend, blocks, theil_sen
from hpcdl.runs.store import RunDir

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What is taken for a leak. Shares are of the growth over the window that is looked at."""

    least_bytes: int = MIB
    """Growth that is worth a word."""
    least_share: float = 0.002
    """The same, of what the process has."""
    samples: int = 24
    """After the warm-up, at least."""
    blocks: int = 32
    """Floors that are compared, at most; four samples make one."""
    confidence: float = 0.99
    """Of the slope's interval, which must lie above 0."""
    falls: float = 0.35
    """A floor may lie below an earlier one by this share of the growth."""
    jumps: float = 0.2
    """Jumps of like size, a block, that would make the growth."""
    least_jumps: float = 5.0
    """The same, in all."""
    steady: float = 0.35
    """Each third's slope is this share of the whole's at least."""
    lately: float = 0.65
    """The last third's slope is this share of the middle one's and of the whole's at least."""
    since_first: float = 0.55
    """The last third's slope is this share of the first one's at least."""
    late: float = 0.9
    """Both, where more than the first tenth had to be left out: a curve that flattens looks straight near its end."""
    noise: float = 4.0
    """The growth is this many times the floors' scatter about the line (median absolute deviation)."""


USUAL = Rules()


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What a series of memory against steps says."""

    leak: bool
    why: str
    """What speaks against a leak; empty where nothing does."""
    bytes_per_step: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)
    """Of bytes_per_step, at `Rules.confidence`."""
    growth_bytes: float = 0.0
    """From the first step to the last one, along the line."""
    first_step: float = 0.0
    """After the warm-up."""
    last_step: float = 0.0
    samples: int = 0
    """After the warm-up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one process's memory did over a try."""

    node: str
    attempt: str
    who: Who
    growth: Growth
    steps_until_full: float | None
    """From the last sample on, were the run to go on; None where nothing grows or the room isn't known."""
    step_s: float | None
    """Seconds a step, lately."""


def of_run(run: RunDir, rules: Rules = USUAL) -> list[Verdict]:
    """The verdicts on every process that was seen long enough, leaks first, from the run's system-<node>.jsonl.

    Args:
        run: the run, over or not.
        rules: what is taken for a leak.
    """
    looks = _looks(run)
    verdicts: list[Verdict] = []
    for node in records.nodes(run):
        tries: dict[str, tuple[Gathered, NodeSample]] = {}
        for sample in records.read(run, node):
            gathered = tries[sample.attempt][0] if sample.attempt in tries else Gathered()
            gathered.take(sample)
            tries[sample.attempt] = gathered, sample
        for attempt, (gathered, last) in tries.items():
            verdicts += [
                _verdict(
                    node, attempt, who, series, last, rules, looks.get((node, attempt, who.role, who.rank))
                )
                for who, series in gathered.judged()
                if series.seen >= rules.samples
            ]
    return sorted(verdicts, key=lambda each: (not each.growth.leak, -each.growth.bytes_per_step))


def _looks(run: RunDir) -> dict[tuple[str, str, str, int | None], float]:
    """The steps after which processes were traced, by node, try, role and rank: that has grown them, too."""
    found: dict[tuple[str, str, str, int | None], float] = {}
    for event in run.events():
        process, look = event.get("process"), event.get("look")
        if event.get("event") == "leak" and isinstance(process, dict) and isinstance(look, dict):
            key = (
                str(event.get("node")),
                str(event.get("try")),
                str(process.get("role")),
                process.get("rank"),
            )
            found.setdefault(key, float(look.get("steps", [0])[0]))
    return found


def _verdict(
    node: str,
    attempt: str,
    who: Who,
    series: Series,
    last: NodeSample,
    rules: Rules,
    traced: float | None,
) -> Verdict:
    points = series.points
    if traced is not None:
        points = [point for point in points if point[0] <= traced]
    growth = judge(points, rules)
    left = steps_until_full(who, growth.bytes_per_step, last) if growth.leak else None
    return Verdict(
        node=node, attempt=attempt, who=who, growth=growth, steps_until_full=left, step_s=series.step_s
    )


def steps_until_full(who: Who, bytes_per_step: float, sample: NodeSample) -> float | None:
    """Steps until the node, its control group or the fullest GPU has nothing left; None where that isn't known.

    Args:
        who: whose memory.
        bytes_per_step: of all that grow there.
        sample: what is left.
    """
    room = sample.memory_available_bytes
    if who.memory == "gpu":
        left = [
            gpu.memory_total_bytes - gpu.memory_used_bytes
            for gpu in sample.gpus
            if gpu.memory_total_bytes is not None
            and gpu.memory_used_bytes is not None
            and (who.role != "gpu" or gpu.index == who.rank)
        ]
        room = min(left, default=None)
    return None if room is None or bytes_per_step <= 0 else room / bytes_per_step


def judge(points: Sequence[Point], rules: Rules = USUAL) -> Growth:
    """The verdict on one process's memory.

    Args:
        points: (step, bytes) in the order of time, of one process; in any spacing, several of one step too.
        rules: what is taken for a leak.
    """
    points = sorted(points)
    whole = _of_window(points[len(points) // 10 :], rules)
    if whole.leak:
        return whole
    late = dataclasses.replace(rules, lately=rules.late, since_first=rules.late)
    for share in (0.3, 0.5):
        later = _of_window(points[int(len(points) * share) :], late)
        if later.leak:
            return later
    return whole


def _of_window(points: Sequence[Point], rules: Rules) -> Growth:
    """The verdict without a warm-up."""
    if len(points) < rules.samples or len({step for step, _ in points}) < rules.samples // 2:
        return Growth(leak=False, why="too few samples", samples=len(points))
    floors = [_floor(part) for part in blocks(points, min(rules.blocks, max(12, len(points) // 4)))]
    trend = theil_sen(floors, rules.confidence)
    span = floors[-1][0] - floors[0][0]
    found = Growth(
        leak=False,
        why="",
        bytes_per_step=trend.slope,
        interval=(trend.low, trend.high),
        growth_bytes=trend.slope * span,
        first_step=points[0][0],
        last_step=points[-1][0],
        samples=len(points),
    )
    why = _against(floors, trend, found.growth_bytes, rules)
    return dataclasses.replace(found, leak=not why, why=why)


def _floor(part: Sequence[Point]) -> Point:
    """Low, but not the lowest: one odd sample is no floor."""
    values = sorted(value for _, value in part)
    return statistics.fmean(step for step, _ in part), values[(len(values) - 1) // 4]


def _against(floors: Sequence[Point], trend: Trend, growth: float, rules: Rules) -> str:
    """The first thing that speaks against a leak."""
    levels = [value for _, value in floors]
    least = max(rules.least_bytes, rules.least_share * levels[0])
    if trend.low <= 0:
        return "doesn't grow" if growth < least else "no sure trend"
    if growth < least:
        return f"grows by less than {least / MIB:.1f} MiB"
    if _largest_fall(levels) > rules.falls * growth:
        return "falls again"
    if _jumps(levels) < max(rules.least_jumps, rules.jumps * len(levels)):
        return "grows in a few jumps"
    third = len(floors) // 3
    parts = (floors[:third], floors[third:-third], floors[-third:])
    slopes = [theil_sen(part).slope for part in parts]
    slack = max(_error(part, slope) for part, slope in zip(parts[1:], slopes[1:], strict=True))
    if slopes[2] + slack < max(
        rules.lately * slopes[1], rules.lately * trend.slope, rules.since_first * slopes[0]
    ):
        return "flattens"
    if min(slopes) + slack < rules.steady * trend.slope:
        return "grows now and then"
    if growth < rules.noise * _scatter(floors, trend.slope):
        return "scatters too much"
    return ""


def _largest_fall(levels: Sequence[float]) -> float:
    highest, fall = levels[0], 0.0
    for level in levels:
        highest = max(highest, level)
        fall = max(fall, highest - level)
    return fall


def _jumps(levels: Sequence[float]) -> float:
    """How many jumps of equal size would be as unequal: (Σ jump)² ÷ Σ jump², the inverse of Simpson's index.

    Of the growth that stays: each level is the lowest from there on.
    """
    stays = list(levels)
    for index in range(len(stays) - 2, -1, -1):
        stays[index] = min(stays[index], stays[index + 1])
    jumps = [after - before for before, after in pairwise(stays)]
    squares = sum(jump * jump for jump in jumps)
    return sum(jumps) ** 2 / squares if squares else 0.0


def _error(points: Sequence[Point], slope: float) -> float:
    """Standard error of a slope, by the points' scatter about the line."""
    spread = statistics.pstdev(step for step, _ in points) * math.sqrt(len(points))
    return _scatter(points, slope) / spread if spread else 0.0


def _scatter(points: Sequence[Point], slope: float) -> float:
    rest = [value - slope * step for step, value in points]
    middle = statistics.median(rest)
    return 1.4826 * statistics.median(abs(each - middle) for each in rest)
