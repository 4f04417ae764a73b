"""Every launch plans: what can't fit is refused before it is submitted, with what would make it fit.

A point whose plan is above its limit by no more than the plan's own error (hpcdl.plan.limits.MARGIN) is only warned of,
and of what is unknown nothing is claimed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcdl import experiment
from hpcdl.errors import ConfigError, Fault
from hpcdl.launch import calibrating
from hpcdl.launch.compose import Composer
from hpcdl.launch.points import Planned, runs_folder
from hpcdl.launch.sweep import Asked, Refused
from hpcdl.plan import hardware, limits, make
from hpcdl.plan.records import Hardware, Plan
from hpcdl.plan.units import gib, seconds
from hpcdl.spec import ExperimentSpec

NO_MATTER = frozenset({"name", "seed", "code", "tracker", "preflight"})
"""Parts of an experiment that change neither its memory nor its time."""
EXPLAINED = 3
"""Points of a sweep for which it is tried out what would make them fit."""


@dataclass(kw_only=True)
class Planner:
    """The plans of one launch: points of a sweep that differ in nothing that matters have one plan."""

    ask: bool = True
    """Whether Slurm may be asked for what the config doesn't say."""
    runs_dir: Path | None = None
    """Folder of all runs: what its finished ones have shown is planned with; None: the planner's own constants."""
    _steps: dict[tuple[str, ...], make.Step] = field(default_factory=dict)
    _plans: dict[tuple[tuple[str, ...], tuple[str, ...]], Plan] = field(default_factory=dict)
    _hardware: dict[tuple[str, ...], Hardware] = field(default_factory=dict)
    _texts: dict[int, tuple[object, str]] = field(default_factory=dict)
    _trainers: dict[int, tuple[object, str]] = field(default_factory=dict)

    def plan(self, spec: ExperimentSpec) -> Plan:
        """The experiment's plan."""
        shape = tuple(self._texts_of(spec))
        counts = tuple(str(getattr(spec.trainer, name)) for name in make.COUNTS)
        if (shape, counts) not in self._plans:
            found = self.hardware(spec)
            if shape not in self._steps:
                self._steps[shape] = make.step(spec, found)
            self._plans[shape, counts] = make.whole(spec, found, self._steps[shape])
        return self._plans[shape, counts]

    def hardware(self, spec: ExperimentSpec) -> Hardware:
        """What it is planned for; everything of one cluster section is asked for once."""
        key = (self._text(spec.cluster), str(spec.trainer.threads_per_process))
        if key not in self._hardware:
            found = hardware.of(spec, ask=self.ask)
            self._hardware[key] = (
                found if self.runs_dir is None else calibrating.applied(self.runs_dir, found)
            )
        return self._hardware[key]

    def _texts_of(self, spec: ExperimentSpec) -> list[str]:
        optim = f"{spec.optim.name} {spec.optim.momentum != 0}"
        apart = NO_MATTER | {"optim", "trainer"}
        names = [each.name for each in dataclasses.fields(spec) if each.name not in apart]
        return [optim, self._text_of_trainer(spec), *(self._text(getattr(spec, name)) for name in names)]

    def _text_of_trainer(self, spec: ExperimentSpec) -> str:
        known = self._trainers.get(id(spec.trainer))
        if known is None:
            alike: dict[str, Any] = dict.fromkeys(make.COUNTS, 0)
            text = repr(dataclasses.replace(spec.trainer, **alike))
            known = self._trainers[id(spec.trainer)] = (spec.trainer, text)
        return known[1]

    def _text(self, section: Any) -> str:
        """A section in words. Points share most of theirs, so each is spelled out once."""
        known = self._texts.get(id(section))
        if known is None:
            known = self._texts[id(section)] = (section, repr(section))
        return known[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """What a launch goes on with."""

    planned: list[Planned]
    """Less what can't fit; each that will be launched has its plan."""
    asked: Asked
    """With what can't fit among the refused."""
    warnings: tuple[str, ...]
    """What may not fit, and what is submitted all the same."""


def fitting(planned: Sequence[Planned], asked: Asked, composer: Composer) -> Fitting:
    """Plans everything that a launch would submit.

    Args:
        planned: what the launch would do.
        asked: what the command line asks for.
        composer: makes the config of a change that may help.

    Raises:
        ConfigError: a single run can't fit, or no point of a sweep can, or one can't with `strict=true`.
    """
    planner = Planner(runs_dir=runs_folder(asked.options))
    points = {point.label: point for point in asked.points}
    checked = [faults_of(item.spec) for item in planned if item.launches]
    if any(checked):
        raise ConfigError(experiment.merge_faults(("", faults) for faults in checked if faults))
    kept, refused, warnings = [], [], []
    explained: dict[int, tuple[str, ...]] = {}
    for item in planned:
        if not item.launches:
            kept.append(item)
            continue
        plan = planner.plan(item.spec)
        judged = limits.verdict(plan)
        where = f"{item.labels[0]}: " if item.labels and item.labels[0] else ""
        if judged == "too big" and not asked.options.force_fit:
            from hpcdl.launch import changes  # few launches need them

            if id(plan) not in explained and len(explained) < EXPLAINED:
                explained[id(plan)] = changes.found(points[item.labels[0]], planner.plan, composer)
            fault = too_big(plan, explained.get(id(plan), ()))
            refused += [
                Refused(label=label, faults=(fault,), number=points[label].number) for label in item.labels
            ]
            continue
        if judged in ("too big", "close"):
            forced = ", and is submitted all the same (force_fit=true)" if judged == "too big" else ""
            warnings.append(f"{where}memory {limits.fits_in_words(plan)}{forced}")
        kept.append(dataclasses.replace(item, plan=plan))
    if refused and (not asked.swept or asked.options.strict or not kept):
        raise ConfigError(experiment.merge_faults((one.label, one.faults) for one in refused))
    more = tuple(sorted((*asked.refused, *refused), key=lambda one: one.number))
    left = tuple(point for point in asked.points if point.label not in {one.label for one in refused})
    return Fitting(
        planned=kept,
        asked=dataclasses.replace(asked, points=left, refused=more),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def again(planned: Sequence[Planned], runs_dir: Path) -> tuple[list[Planned], tuple[str, ...]]:
    """The same for runs that were accepted before and go on: what may not fit is warned of, nothing refused."""
    planner = Planner(runs_dir=runs_dir)
    known = [dataclasses.replace(item, plan=planner.plan(item.spec)) for item in planned]
    warnings = [
        f"{item.run.path.name}: memory {limits.fits_in_words(item.plan)}"
        for item in known
        if item.plan is not None and limits.verdict(item.plan) in ("too big", "close")
    ]
    return known, tuple(warnings)


def faults_of(spec: ExperimentSpec) -> tuple[Fault, ...]:
    """What the planner doesn't understand of the config."""
    return tuple(hardware.faults(spec.cluster))


def too_big(plan: Plan, fixes: Sequence[str]) -> Fault:
    """Why a run is refused, and what would make it fit."""
    peak, limit = plan.peak, plan.hardware.device.memory_bytes
    assert peak is not None
    assert limit is not None
    stage = f" of pipeline stage {peak.stage}" if plan.memory and len(plan.memory) > 1 else ""
    held = {**peak.at_peak, "allocator": peak.allocator, "runtime": peak.runtime}
    largest = sorted(held.items(), key=lambda pair: -pair[1])[:3]
    parts = ", ".join(f"{name} {gib(size)}" for name, size in largest if size)
    return Fault(
        key="memory",
        value=f"{gib(peak.peak)} a process",
        problem=f"is what a process{stage} would hold at its peak by its plan, and it doesn't fit; most of it: {parts}",
        allowed=f"{gib(limit)} a process: {plan.hardware.sources.get('memory', '')}",
        fix="" if fixes else "hpcdl plan with the same words shows where the bytes go",
        fixes=(*fixes, "force_fit=true to submit it all the same"),
    )


def line(points: Sequence[Planned]) -> str:
    """The plan of a launch on one line; empty where nothing is launched."""
    plans = {id(item.plan): item.plan for item in points if item.plan is not None}
    if not plans:
        return ""
    if len(plans) == 1:
        return limits.line(next(iter(plans.values())))
    return _of_several(list(plans.values()))


def _of_several(plans: Sequence[Plan]) -> str:
    parts = []
    known = [plan for plan in plans if plan.peak is not None]
    if known:
        most = max(known, key=lambda plan: plan.peak.peak if plan.peak else 0)
        parts.append(f"at most {limits.line(most).partition(',')[0]}")
    timed = [plan.time.step_s for plan in plans if plan.time is not None]
    if timed:
        parts.append(f"steps of {seconds(min(timed))} to {seconds(max(timed))}")
    longest = max((plan.run_s for plan in plans if plan.run_s is not None), default=None)
    if longest is not None:
        parts.append(f"the longest run about {limits.duration(longest)}")
    return ", ".join(parts) or "nothing is known of memory and time"
