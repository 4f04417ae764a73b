"""What each choice costs, asked once."""

from __future__ import annotations

from dataclasses import dataclass, field

from hpcdl.errors import Fault
from hpcdl.plan import make, memory, time
from hpcdl.plan.found import Judged
from hpcdl.plan.records import Hardware, RankMemory, StepTime
from hpcdl.plan.search_space import Choice, Space
from hpcdl.spec import ExperimentSpec


@dataclass(kw_only=True)
class Costs:
    """Memory and time of choices: what was asked already is remembered."""

    ways: Space
    """The choices that there are."""
    hardware: Hardware
    """What they are planned for."""
    limit: int | None
    """Bytes that a rank may hold; None: nobody has said."""
    peaks: dict[Choice, tuple[RankMemory, ...] | None] = field(default_factory=dict)
    times: dict[Choice, StepTime | None] = field(default_factory=dict)
    specs: dict[Choice, ExperimentSpec] = field(default_factory=dict)
    refusals: dict[Choice, bool] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    """Of the first choice that rules refuse."""
    unknown: str = ""
    """Why something is unknown."""

    def spec(self, choice: Choice) -> ExperimentSpec:
        """The experiment with a choice."""
        if choice not in self.specs:
            self.specs[choice] = self.ways.applied(choice)
        return self.specs[choice]

    def held(self, choice: Choice) -> tuple[RankMemory, ...] | None:
        """Bytes of each stage's ranks; None: unknown, and `unknown` says why."""
        if choice not in self.peaks:
            spec = self.spec(choice)
            # of a run that may lose nodes the smallest must fit: fewer ranks share the same
            found = memory.ranks(spec, self.hardware.device.kind, make.smallest_world(spec))
            self.peaks[choice] = None if found is None else self.hardware.device.holding(found)
            if self.peaks[choice] is None:
                self.unknown = (
                    self.unknown or memory.why_unknown(spec) or "no closed form of its memory is known"
                )
        return self.peaks[choice]

    def peak(self, choice: Choice) -> float:
        """Of the rank that holds most; infinite where it is unknown."""
        held = self.held(choice)
        return max(rank.peak for rank in held) if held else float("inf")

    def fits(self, choice: Choice) -> bool:
        """Whether every rank stays within the limit; False where that is unknown."""
        peak = self.peak(choice)
        return peak < float("inf") and (self.limit is None or peak <= self.limit)

    def step(self, choice: Choice) -> StepTime | None:
        """Seconds of a step, by what they go to; None: unknown, and `unknown` says why."""
        if choice not in self.times:
            spec = self.spec(choice)
            self.times[choice] = time.step(spec, self.hardware)
            if self.times[choice] is None:
                why = memory.why_unknown(spec)
                self.unknown = self.unknown or why or "no closed form of its step time is known"
        return self.times[choice]

    def seconds(self, choice: Choice) -> float:
        """Of a step; infinite where that is unknown."""
        step = self.step(choice)
        return step.step_s if step else float("inf")

    def judged(self, choice: Choice) -> Judged | None:
        """Both, where both are known."""
        held, step = self.held(choice), self.step(choice)
        if held is None or step is None:
            return None
        return Judged(choice=choice, spec=self.spec(choice), memory=held, time=step, limit_bytes=self.limit)

    def refused(self, choice: Choice) -> bool:
        """Whether a rule says no; the first such is remembered in `faults`."""
        if choice not in self.refusals:
            faults = self.ways.refusals(choice)
            self.faults = self.faults or faults
            self.refusals[choice] = bool(faults)
        return self.refusals[choice]

    @property
    def looked_at(self) -> int:
        """Choices whose memory or time was worked out."""
        return len({*self.peaks, *self.times})

    def known(self) -> list[Judged]:
        """Everything of which both were."""
        return [one for choice in self.peaks if choice in self.times and (one := self.judged(choice))]
