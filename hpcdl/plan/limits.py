"""Whether a planned run fits, and what is said of it."""

from __future__ import annotations

from typing import Literal

from hpcdl.plan.records import Plan
from hpcdl.plan.units import gib, seconds

Verdict = Literal["fits", "close", "too big", "unknown"]

MARGIN = 0.1
"""A plan may be off by so much (docs/planner.md, Truth): what is above its limit by less is only warned of."""


SURE_OF_HOLES = 0.5
"""Of what malloc keeps on a CPU, what counts as certain: it grows over twenty steps, and large tensors leave none."""


def verdict(plan: Plan) -> Verdict:
    """`fits`; `close`: above the limit by no more than the plan's own error; `too big`; or `unknown`.

    What is called too big is refused, so that a CPU's uncertain part of it must not decide.
    """
    peak, limit = plan.peak, plan.hardware.device.memory_bytes
    if peak is None or limit is None:
        return "unknown"
    if peak.peak <= limit:
        return "fits"
    holes = peak.allocator if plan.hardware.device.kind == "cpu" else 0
    least = min(peak.peak / (1 + MARGIN), peak.peak - (1 - SURE_OF_HOLES) * holes)
    return "close" if least <= limit else "too big"


def against(plan: Plan) -> str:
    """The peak and what it is held against: `planned peak 12.3 GiB of 8.0 GiB a process (cluster.mem_gb)`."""
    peak, limit = plan.peak, plan.hardware.device.memory_bytes
    source = plan.hardware.sources.get("memory", "")
    where = f", pipeline stage {peak.stage}" if peak and plan.memory and len(plan.memory) > 1 else ""
    held = gib(peak.peak) if peak else "unknown"
    room = f"{gib(limit)} a process ({source})" if limit is not None else f"an unknown limit: {source}"
    return f"{held} of {room}{where}"


def fits_in_words(plan: Plan) -> str:
    """The verdict as a sentence without a full stop."""
    peak, limit = plan.peak, plan.hardware.device.memory_bytes
    judged = verdict(plan)
    if peak is None:
        return "whether it fits is not known: no closed form of its memory"
    if limit is None:
        return f"whether it fits is not known: {plan.hardware.sources.get('memory', '')}"
    if judged == "fits":
        return f"fits: {gib(peak.peak)} of {gib(limit)} a process, {gib(limit - peak.peak)} to spare"
    held = f"{gib(peak.peak)} of {gib(limit)} a process, {gib(peak.peak - limit)} too much"
    if judged == "close":
        return f"may not fit: {held}, which is within the plan's error"
    return f"doesn't fit: {held}"


def figures(plan: Plan) -> dict[str, float | None]:
    """What is kept with a run, to be held against what it will have measured."""
    return {
        "peak_bytes": plan.peak.peak if plan.peak else None,
        "step_s": plan.time.step_s if plan.time else None,
        "run_s": plan.run_s,
    }


def line(plan: Plan, start: str = "") -> str:
    """The plan on one line, for a launch.

    Args:
        plan: the run's.
        start: when it is expected to start, in words; empty where nobody was asked.
    """
    peak, limit = plan.peak, plan.hardware.device.memory_bytes
    parts = []
    if peak is None:
        parts.append("memory unknown")
    elif limit is None:
        parts.append(f"{gib(peak.peak)} a process, of nobody knows how much")
    else:
        short = {"fits": "fits", "close": "may not fit", "too big": "doesn't fit"}[verdict(plan)]
        parts.append(f"{gib(peak.peak)} of {gib(limit)} a process ({short})")
    if plan.time is None or plan.run_s is None:
        parts.append("time unknown")
    else:
        parts.append(f"step {seconds(plan.time.step_s)}")
        parts.append(f"{plan.max_steps} steps in about {duration(plan.run_s)}")
    return ", ".join([*parts, *([f"starts {start}"] if start else [])])


def duration(span_s: float) -> str:
    """A length of time in two units: `42 s`, `3 min 20 s`, `5 h 12 min`, `3 d 4 h`."""
    whole = round(span_s)
    if whole < 60:
        return f"{span_s:.1f} s" if span_s < 10 else f"{whole} s"
    for (size, name), (less, small) in (
        ((60, "min"), (1, "s")),
        ((3600, "h"), (60, "min")),
        ((86400, "d"), (3600, "h")),
    ):
        if whole < size * {"min": 60, "h": 24, "d": 10**9}[name]:
            count, rest = whole // size, whole % size // less
            return f"{count:,} {name} {rest} {small}" if rest else f"{count:,} {name}"
    raise AssertionError("unreachable")
