"""Constants of the plan, fitted to runs that have finished: `hpcdl plan --calibrate`.

Memory, for CPUs and GPUs apart: what a process has beside tensors (`beside`) and what the allocator takes (`allocator`)
are planned by constants of ours; here they are moved to what was measured. The slope is Theil and Sen's, which
half of the runs may be wrong about; the constant then is the least with which no run that was measured would have
been planned too small, whatever that does to the median. They go down only where there are runs enough to say so.

Time, for each kind of device: factors of the rates in hpcdl.plan.devices, each a power of 2^(1/8), which together have
the least sum of |log(planned / measured)|; so a run that was disturbed counts once, however far off it is. A factor
has a price of its own: what no run says anything of stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from hpcdl.plan import devices
from hpcdl.plan.records import Device, Hardware, RankMemory

ENOUGH = 5
"""Runs from which on a constant may become smaller than ours."""
BOUNDS = (0.25, 4.0)
"""Of the factor on what the allocator takes."""
MOST = 40
"""Runs whose time is looked at: the newest."""
NOTCH = 2 ** (1 / 8)
WIDEST = 5.0
"""Factors of rates stay within 2^±WIDEST."""
PRICE = 0.01
"""Of a factor of 2, for each run: what it must make the runs' errors smaller by, on average."""
PAIRS = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One rank of a finished run."""

    run: str
    """Which run: its ranks are one witness."""
    kind: str
    """`cpu` or `cuda`."""
    plan: RankMemory
    """Planned with our constants."""
    peak: int
    """Measured: resident at most; on a GPU what was reserved, and what the context and NCCL had beside."""

    @property
    def beside(self) -> int:
        """Measured beside what is planned of tensors and runtime."""
        return self.peak - self.plan.tensors - self.plan.runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """The steps of one finished run."""

    device: str
    """Device's name: `cpu`, `H100`."""
    step_s: float
    """The median of its steps, those that were profiled left out."""
    predict: Callable[[devices.Calibration], float | None]
    """Seconds that a plan with these factors has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Memory beside tensors, of one kind of device."""

    allocator: float = 1.0
    """Factor on RankMemory.allocator."""
    beside: int = 0
    """Bytes on top of RankMemory.runtime; below 0 where a process takes less."""
    runs: int = 0
    """That it was fitted to."""
    error_before: float = 0.0
    """Median error of the peak with our constants."""
    error_after: float = 0.0
    """With these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Time, of one device."""

    factors: devices.Calibration = field(default_factory=devices.Calibration)
    runs: int = 0
    """That they were fitted to."""
    error_before: float = 0.0
    """Median error of a step's seconds with the table's rates."""
    error_after: float = 0.0
    """With these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What finished runs have shown."""

    memory: dict[str, Beside] = field(default_factory=dict)
    """By kind of device."""
    rates: dict[str, Rates] = field(default_factory=dict)
    """By device."""
    time: str = ""
    """When it was fitted (UTC)."""

    def of_hardware(self, hardware: Hardware) -> Hardware:
        """The hardware with these constants and factors."""
        device = hardware.device
        if beside := self.memory.get(device.kind):
            told = dataclasses.replace(device, allocator=beside.allocator, beside_bytes=beside.beside)
            sources = {**hardware.sources, "beside tensors": self._source(beside.runs)}
            hardware = dataclasses.replace(hardware, device=told, sources=sources)
        if rates := self.rates.get(device.name):
            hardware = devices.calibrated(hardware, rates.factors, self._source(rates.runs))
        return hardware

    def _source(self, runs: int) -> str:
        return f"calibrated by {runs} finished run{'s' * (runs != 1)}, {self.time[:10]}"

    @classmethod
    def from_plain(cls, plain: Any) -> Calibration:
        """What `dataclasses.asdict` made, from a file.

        Raises:
            ValueError: it is something else.
        """
        try:
            return cls(
                memory={name: Beside(**each) for name, each in plain["memory"].items()},
                rates={
                    name: Rates(**{**each, "factors": devices.Calibration(**each["factors"])})
                    for name, each in plain["rates"].items()
                },
                time=str(plain["time"]),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a calibration: {error}") from error


def moved(rank: RankMemory, found: Beside) -> RankMemory:
    """A rank's plan with other constants."""
    device = Device(
        name="", kind="cpu", memory_bytes=None, peak_flops={}, efficiency={}, memory_bytes_per_s=1.0,
        allocator=found.allocator, beside_bytes=found.beside,
    )  # fmt: skip
    return device.holding((rank,))[0]


# --- memory ---------------------------------------------------------------------------------------------------


def fit_memory(ranks: Iterable[Held]) -> dict[str, Beside]:
    """Constants for each kind of device; with them no rank that was measured is planned too small."""
    kinds: dict[str, list[Held]] = {}
    for rank in ranks:
        kinds.setdefault(rank.kind, []).append(rank)
    return {kind: _fit_beside(found) for kind, found in kinds.items()}


def _fit_beside(ranks: Sequence[Held]) -> Beside:
    runs = len({rank.run for rank in ranks})
    factor = _slope([(rank.plan.allocator, rank.beside) for rank in ranks])
    if runs < ENOUGH:
        factor = max(1.0, factor)
    beside = max(rank.beside - math.ceil(factor * rank.plan.allocator) for rank in ranks)
    if runs < ENOUGH:
        beside = max(0, beside)
    found = Beside(allocator=factor, beside=beside)
    return dataclasses.replace(
        found,
        runs=runs,
        error_before=statistics.median(abs(rank.plan.peak / rank.peak - 1) for rank in ranks),
        error_after=statistics.median(abs(moved(rank.plan, found).peak / rank.peak - 1) for rank in ranks),
    )


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """The median slope of all pairs, within BOUNDS; 1 where the allocator's share is the same in all."""
    step = max(1, math.comb(len(points), 2) // PAIRS)
    pairs = list(combinations(sorted(points), 2))[::step]
    slopes = [(y - below) / (x - before) for (before, below), (x, y) in pairs if x > before]
    return min(max(statistics.median(slopes), BOUNDS[0]), BOUNDS[1]) if slopes else 1.0


# --- time -----------------------------------------------------------------------------------------------------


def fit_rates(runs: Sequence[Timed]) -> dict[str, Rates]:
    """Factors for each device.

    Args:
        runs: the newest first.
    """
    by_device: dict[str, list[Timed]] = {}
    for run in runs:
        if run.predict(devices.Calibration()) is not None:
            by_device.setdefault(run.device, []).append(run)
    return {name: _fit_device(found[:MOST]) for name, found in by_device.items()}


def _fit_device(runs: Sequence[Timed]) -> Rates:
    names = [each.name for each in dataclasses.fields(devices.Calibration)]
    plain = dict.fromkeys(names, 0.0)
    best, price = dict(plain), _price(runs, plain)
    width = 8
    while width:  # each factor in turn, by ever smaller steps, until none of them helps
        better = False
        for name in names:
            for notches in (-width, width):
                tried = {**best, name: best[name] + notches}
                if abs(tried[name]) > WIDEST * 8:
                    continue
                cost = _price(runs, tried)
                if cost < price - 1e-9:
                    best, price, better = tried, cost, True
        width = width if better else width // 2
    factors = _factors(best)
    return Rates(
        factors=factors,
        runs=len(runs),
        error_before=_median_error(runs, devices.Calibration()),
        error_after=_median_error(runs, factors),
    )


def _factors(notches: dict[str, float]) -> devices.Calibration:
    return devices.Calibration(**{name: NOTCH**count for name, count in notches.items()})


def _price(runs: Sequence[Timed], notches: dict[str, float]) -> float:
    """Mean of |log2(planned / measured)|, and the factors' own."""
    factors = _factors(notches)
    errors = [abs(math.log2((run.predict(factors) or math.inf) / run.step_s)) for run in runs]
    return statistics.fmean(errors) + PRICE * sum(abs(count) / 8 for count in notches.values())


def _median_error(runs: Sequence[Timed], factors: devices.Calibration) -> float:
    return statistics.median(abs((run.predict(factors) or math.inf) / run.step_s - 1) for run in runs)
