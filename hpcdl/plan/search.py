"""The quickest way to train that fits: over meshes, micro-batches, schedules, recomputation and offload.

Each mesh is asked for its leanest way first: where even that doesn't fit, nothing of the mesh is looked at. From
there it recomputes less and keeps more for as long as it fits. A pipeline without idle time bounds from below how
long a step takes in any schedule; meshes are taken in this order, and once the bound is above what was found, all
that are left are slower (branch and bound: Land and Doig, "An Automatic Method of Solving Discrete Programming
Problems", 1960). What costs much (host memory, tensor parallel between nodes) is tried only where nothing fits
without.

Similar searches: Zheng et al., "Alpa", OSDI 2022; Miao et al., "Galvatron", VLDB 2022, which have finer choices a
layer and need profiles; here are the choices that a config has, and closed forms.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hpcdl.errors import Fault
from hpcdl.parallel import auto
from hpcdl.plan import found as words
from hpcdl.plan import make, memory, time, units
from hpcdl.plan.found import Found, Judged, Lost
from hpcdl.plan.records import Hardware, RankMemory, StepTime
from hpcdl.plan.search_remedies import Asked, remedies
from hpcdl.plan.search_space import Choice, Space, space
from hpcdl.spec import ExperimentSpec

ALLOWED = auto.Config(name="auto").allow
"""What may be chosen besides degrees, where nobody says."""
SHARE = auto.Config(name="auto").memory_share
"""How much of a rank's memory the choice may fill, where nobody says."""
EQUAL = 0.01
"""Two step times that differ by less than this share are equal: the simpler choice wins."""
MOST = 6000
"""Choices that are looked at, at most; a bound on time, which has never been reached."""
Beyond = dict[tuple[str, bool], list[tuple[int, int]]]
"""For each recomputation and resharding what was too large: over how many ranks sharded, and with which micro-batch.
Sharded less, or with a larger micro-batch, it holds more."""
RUNNERS_UP = 5
LEAN = 24
"""Meshes besides whose leanest way is worked out for the front."""


def search(
    spec: ExperimentSpec,
    hardware: Hardware,
    *,
    allow: Collection[str] = ALLOWED,
    keep: Collection[str] = (),
    memory_bytes: int | None = None,
    memory_share: float = SHARE,
) -> Found:
    """The quickest way to train this on that hardware.

    Args:
        spec: the experiment, with any strategy; under parallel=auto its degrees above 0 stay.
        hardware: what it shall run on; nodes and processes are the cluster section's.
        allow: what may be chosen besides degrees (hpcdl.parallel.auto.ALLOWED).
        keep: dotted keys that stay as they are in any case.
        memory_bytes: what a rank may hold; None: what its device has.
        memory_share: the share of that which the choice may fill.
    """
    room = memory_bytes or hardware.device.memory_bytes
    asked = Asked(spec=spec, hardware=hardware, allow=frozenset(allow), room=room, share=memory_share)
    found = _asked(asked, keep).run()
    if found.nearest is None:
        return found
    return dataclasses.replace(found, remedies=remedies(asked, lambda other: _asked(other, keep).leanest()))


def _asked(asked: Asked, keep: Collection[str]) -> _Search:
    hardware = asked.hardware
    ways = space(
        asked.spec,
        hardware.ranks_per_node,
        gpus=hardware.device.kind == "cuda",
        allow=asked.allow,
        keep=keep,
    )
    limit = None if asked.room is None else int(asked.room * asked.share)
    return _Search(ways=ways, hardware=hardware, limit=limit)


class _Queue:
    """Meshes by the least time that a step of theirs can take."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Choice, int]] = []
        self._count = itertools.count()

    def __bool__(self) -> bool:
        return bool(self._heap)

    def push(self, bound: float, mesh: Choice, level: int) -> None:
        """Adds a mesh of which all that recomputes less than `level` is too large."""
        heapq.heappush(self._heap, (bound, next(self._count), mesh, level))

    def pop(self) -> tuple[float, Choice, int]:
        """The one with the least time."""
        bound, _, mesh, level = heapq.heappop(self._heap)
        return bound, mesh, level


def _worst(best: Mapping[Any, tuple[float, Choice]]) -> float:
    """What a mesh must stay below to be among those that are told."""
    times = sorted(value for value, _ in best.values())
    return times[RUNNERS_UP] if len(times) > RUNNERS_UP else float("inf")


def _alike(mesh: Choice) -> tuple[object, ...]:
    """Meshes that differ in how far they shard alone have this in common."""
    other = mesh.strategy if mesh.strategy in auto.OFF_THE_MESH else ""
    return (mesh.pp, mesh.cp, mesh.tp, mesh.quant, mesh.dp_shard > 1, other)


def _is_beyond(choice: Choice, beyond: Beyond) -> bool:
    """Whether something that holds less was too large."""
    known = beyond.get((choice.checkpointing, choice.reshard), ())
    return any(choice.dp_shard <= shard and choice.micro_batch_size >= size for shard, size in known)


@dataclass(kw_only=True)
class _Search:
    """One search: what was asked already is remembered."""

    ways: Space
    hardware: Hardware
    limit: int | None
    peaks: dict[Choice, tuple[RankMemory, ...] | None] = field(default_factory=dict)
    times: dict[Choice, StepTime | None] = field(default_factory=dict)
    specs: dict[Choice, ExperimentSpec] = field(default_factory=dict)
    possible: int = 0
    faults: list[Fault] = field(default_factory=list)
    """Of the first mesh that rules refuse."""
    unknown: str = ""

    # --- what a choice costs ----------------------------------------------------------------------------------

    def spec(self, choice: Choice) -> ExperimentSpec:
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
            found = self.peaks[choice]
            if found is not None:
                self.peaks[choice] = self.hardware.device.holding(found)
        return self.peaks[choice]

    def peak(self, choice: Choice) -> float:
        """Of the rank that holds most; infinite where it is unknown."""
        held = self.held(choice)
        return max(rank.peak for rank in held) if held else float("inf")

    def fits(self, choice: Choice) -> bool:
        peak = self.peak(choice)
        return peak < float("inf") and (self.limit is None or peak <= self.limit)

    def step(self, choice: Choice) -> StepTime | None:
        if choice not in self.times:
            self.times[choice] = time.step(self.spec(choice), self.hardware)
            if self.times[choice] is None:
                self.unknown = self.unknown or "no closed form of its step time is known"
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

    # --- the search -------------------------------------------------------------------------------------------

    def run(self) -> Found:
        fitting: list[Choice] = []
        for wide, offload in ((False, False), (False, True), (True, False), (True, True)):
            fitting = self._pass(wide=wide, offload=offload)
            if fitting:
                break
        return self._found(fitting)

    def leanest(self) -> tuple[Choice, float] | None:
        """The choice that holds least, and what it holds; None where none is known, or possible."""
        found: list[tuple[Choice, float]] = []
        for wide in (False, True):
            seen: set[tuple[object, ...]] = set()
            for mesh in self._meshes(wide=wide):
                if _alike(mesh) in seen or self._refused(mesh):
                    continue  # sharded less than one before
                seen.add(_alike(mesh))
                lean = self._lean(mesh)
                found += [(one, self.peak(one)) for one in (lean, *self._offloaded(lean))]
        return min(found, key=lambda one: one[1], default=None)

    def _lean(self, mesh: Choice) -> Choice:
        recomputed = self.ways.checkpointings()[-1]
        return dataclasses.replace(mesh, checkpointing=recomputed, reshard=self.ways.reshards(mesh)[-1])

    def _pass(self, *, wide: bool, offload: bool) -> list[Choice]:
        """The best choice of each mesh that could be among the best, in no order."""
        queue = _Queue()
        levels = self.ways.checkpointings()
        sharded_most: dict[tuple[object, ...], Choice] = {}
        for mesh in self._meshes(wide=wide):
            sharded_most.setdefault(_alike(mesh), mesh)
            self.possible += self.ways.count(mesh)
            queue.push(
                self._quick(mesh, levels[-1 if offload else 0]), mesh, len(levels) - 1 if offload else 0
            )
        large: dict[tuple[object, ...], Beyond] = {}
        best: dict[tuple[object, ...], tuple[float, Choice]] = {}
        while queue and len(self.peaks) < MOST:
            bound, mesh, level = queue.pop()
            if bound > _worst(best) or bound == float("inf"):
                break
            beyond = large.setdefault(_alike(mesh), {})
            if not offload and not self._may_fit(mesh, levels[level], sharded_most[_alike(mesh)], beyond):
                if level + 1 < len(levels):  # no quicker than with more recomputed: later, perhaps never
                    queue.push(max(bound, self._quick(mesh, levels[level + 1])), mesh, level + 1)
                continue
            if self._refused(mesh):
                continue
            for ways in self._ways(mesh, beyond, offload=offload):
                if min(map(self._bound, ways)) > _worst(best):
                    continue
                for choice in self._scheduled(ways):
                    took = self.seconds(choice)
                    if took < best.get(choice.mesh, (float("inf"),))[0]:
                        best[choice.mesh] = (took, choice)
        return [choice for _, choice in best.values()]

    def _may_fit(self, mesh: Choice, recomputed: str, leanest: Choice, beyond: Beyond) -> bool:
        """Whether a mesh that recomputes so much may fit, by what is known of the one that shards most."""
        key = (recomputed, self.ways.reshards(mesh)[-1])
        lean = dataclasses.replace(leanest, checkpointing=recomputed, reshard=key[1])
        if not self.fits(lean):
            beyond.setdefault(key, []).append((lean.dp_shard, lean.micro_batch_size))
        return not _is_beyond(dataclasses.replace(mesh, checkpointing=recomputed, reshard=key[1]), beyond)

    def _quick(self, mesh: Choice, recomputed: str) -> float:
        """Seconds that a step of this mesh takes at least: with the largest micro-batch and nothing resharded."""
        return self._bound(
            dataclasses.replace(
                mesh,
                checkpointing=recomputed,
                reshard=self.ways.reshards(mesh)[0],
                micro_batch_size=max(self.ways.micro_batches(mesh.data_ranks)),
            )
        )

    def _bound(self, choice: Choice) -> float:
        """Seconds that a step takes at least, whatever the schedule: a pipeline without idle time."""
        step = self.step(choice)
        return step.step_s - step.bubble_s if step else float("inf")

    def _meshes(self, *, wide: bool) -> Iterator[Choice]:
        """In every scheme that is allowed; what is sharded most first."""
        others: Iterable[Choice] = () if wide else self.ways.off_the_mesh()
        for mesh in (*self.ways.meshes(wide=wide), *others):
            for scheme in self.ways.schemes():
                yield dataclasses.replace(mesh, quant=scheme)

    def _refused(self, mesh: Choice) -> bool:
        """Whether a rule refuses it."""
        faults = self.ways.refusals(mesh)
        self.faults = self.faults or faults
        return bool(faults)

    def _ways(self, mesh: Choice, beyond: Beyond, *, offload: bool) -> Iterator[list[Choice]]:
        """For each micro-batch those that fit and may be the quickest of it, in the plainest schedule."""
        lean = self._lean(mesh)
        for size in self.ways.micro_batches(mesh.data_ranks):
            leaner = dataclasses.replace(lean, micro_batch_size=size)
            if mesh.pp > 1 and self.ways.pipeline_refuses(leaner):
                continue  # too few to fill it
            found = self._offloading(leaner) if offload else self._fitting(leaner, beyond)
            if not found:
                return  # larger ones hold more
            yield found

    def _offloading(self, lean: Choice) -> list[Choice]:
        return [one for one in self._offloaded(lean) if self.fits(one)][:1]

    def _offloaded(self, choice: Choice) -> Iterator[Choice]:
        for one in self.ways.offloads(choice):
            if not one.cpu_offload or not self.ways.refusals(one):
                yield one

    def _fitting(self, lean: Choice, beyond: Beyond) -> list[Choice]:
        """From the leanest on what fits: what recomputes less, or keeps more gathered, holds more and is quicker.

        Args:
            lean: the leanest.
            beyond: what was too large before; what is found to be so is added.
        """
        fitting: dict[str, list[bool]] = {}
        recomputed, reshards = self.ways.checkpointings(), self.ways.reshards(lean)
        for reshard in reversed(reshards):
            for one in reversed(recomputed):
                choice = dataclasses.replace(lean, checkpointing=one, reshard=reshard)
                if _is_beyond(choice, beyond) or not self.fits(choice):
                    beyond.setdefault((one, reshard), []).append((choice.dp_shard, choice.micro_batch_size))
                    break
                fitting.setdefault(one, []).insert(0, reshard)
        found = []
        for one in recomputed:
            for reshard in fitting.get(one, ())[:1]:
                found.append(dataclasses.replace(lean, checkpointing=one, reshard=reshard))
                if reshard == reshards[0]:
                    return found  # what recomputes more is slower
        return found

    def _scheduled(self, ways: list[Choice]) -> Iterator[Choice]:
        """In every schedule the quickest that fits."""
        for schedule in self.ways.schedules(ways[0]):
            of_it = [dataclasses.replace(one, schedule=schedule) for one in ways]
            if schedule != ways[0].schedule and self.ways.pipeline_refuses(of_it[0]):
                continue
            yield from (one for one in of_it if self.fits(one))

    # --- what is told -----------------------------------------------------------------------------------------

    def _found(self, fitting: list[Choice]) -> Found:
        if not fitting:
            return self._nothing()
        quickest = min(self.seconds(choice) for choice in fitting)
        equal = [choice for choice in fitting if self.seconds(choice) <= (1 + EQUAL) * quickest]
        best = min(equal, key=lambda choice: (choice.effort, self.seconds(choice), self.peak(choice)))
        self._lean_ends(fitting)
        changes = self._changes(best)
        chosen = self.judged(best)
        assert chosen is not None
        everything = [one for choice in self.peaks if choice in self.times and (one := self.judged(choice))]
        front = words.front(everything)
        return Found(
            chosen=chosen,
            reasons=tuple(self._reasons(chosen, everything)),
            runners_up=tuple(self._runners_up(chosen, fitting, everything)),
            changes=tuple(changes),
            front=front,
            others=tuple(one for one in everything if one not in front),
            nearest=None,
            limit_bytes=self.limit,
            possible=self.possible,
            looked_at=len({*self.peaks, *self.times}),
        )

    def _lean_ends(self, fitting: list[Choice]) -> None:
        """The leanest of the best meshes and of meshes like them, for the front's other end."""
        quickest = min(map(self.seconds, fitting))
        seen: dict[tuple[object, ...], Choice] = {}
        for mesh in self._meshes(wide=False):
            seen.setdefault(_alike(mesh), mesh)
        near = [
            mesh for mesh in seen.values() if self._quick(mesh, self.ways.checkpointings()[-1]) < 2 * quickest
        ]
        best = sorted(fitting, key=self.seconds)[: RUNNERS_UP + 1]
        for mesh in (*best, *words.spread(near, LEAN)):
            sizes = self.ways.micro_batches(mesh.data_ranks)
            lean = dataclasses.replace(self._lean(mesh), micro_batch_size=min(sizes), schedule="1f1b")
            if not self.ways.refusals(lean):
                self.judged(lean)

    def _changes(self, best: Choice) -> list[Lost]:
        """The chosen one with one thing changed, each way that there is."""
        changed: list[Choice] = []
        for recomputed in self.ways.checkpointings():
            changed.append(dataclasses.replace(best, checkpointing=recomputed))
        for reshard in self.ways.reshards(best):
            changed.append(dataclasses.replace(best, reshard=reshard))
        for schedule in self.ways.schedules(best):
            changed.append(dataclasses.replace(best, schedule=schedule))
        for size in self.ways.micro_batches(best.data_ranks):
            if size in (best.micro_batch_size // 2, best.micro_batch_size * 2):
                changed.append(dataclasses.replace(best, micro_batch_size=size))
        own, found = self.judged(best), []
        assert own is not None
        for choice in dict.fromkeys(changed):
            one = None if choice == best or self.ways.refusals(choice) else self.judged(choice)
            if one is not None:
                found.append(Lost(judged=one, why=words.why_lost(one, own)))
        return found

    def _runners_up(self, chosen: Judged, fitting: list[Choice], everything: list[Judged]) -> Iterator[Lost]:
        """The next best of other meshes, and before them what would be quicker if it fitted."""
        large = sorted((one for one in everything if not one.fits), key=lambda one: one.over_bytes)
        better = [
            one for one in large if one.step_s < 0.99 * chosen.step_s and one.over_bytes < (self.limit or 0)
        ]
        others = [choice for choice in fitting if choice.mesh != chosen.choice.mesh]
        slower = [self.judged(choice) for choice in sorted(others, key=self.seconds)[:RUNNERS_UP]]
        seen = {chosen.choice.mesh}
        for one in (*better, *slower):
            if one is None or one.choice.mesh in seen or (not one.fits and len(seen) > 2):
                continue
            seen.add(one.choice.mesh)
            yield Lost(judged=one, why=words.why_lost(one, chosen))

    def _reasons(self, chosen: Judged, everything: list[Judged]) -> Iterator[str]:
        fitting = sum(one.fits for one in everything)
        limit = "" if self.limit is None else f" into {units.gib(self.limit)} a process"
        yield (
            f"the quickest of {fitting} that were worked out and fit{limit}; of {self.possible} possible ones the"
            " others don't fit or can't be quicker"
        )
        if self.limit is None:
            yield "nobody has said what memory a process has: whether it fits was not asked"
        choice = chosen.choice
        if choice.cpu_offload or choice.activation_offload != "none":
            yield "without host memory nothing fits"
        if self.hardware.ranks_per_node % choice.tp:
            yield "tensor parallel goes over several nodes, because nothing fits otherwise"
        quicker = [one for one in everything if one.fits and one.step_s < chosen.step_s]
        if quicker:
            yield f"{words.name(quicker[0].choice)} is no more than {EQUAL:.0%} quicker, and less simple"

    def _nothing(self) -> Found:
        """Nothing fits, or nothing can be said: what comes nearest."""
        known = [choice for choice, held in self.peaks.items() if held]
        near = self.judged(min(known, key=self.peak)) if known else None
        if near is not None and near.over_bytes:
            way = f"{words.name(near.choice)} with {words.details(near.choice)}"
            reasons = [
                f"nothing fits into {units.gib(self.limit or 0)} a process: the leanest, {way}, is"
                f" {units.gib(near.over_bytes)} too large"
            ]
        elif self.unknown:
            reasons = [self.unknown]
        else:
            reasons = [f"{fault.key} = {fault.value}: {fault.problem}" for fault in self.faults[:3]]
            batch, world = self.ways.spec.trainer.global_batch_size, self.ways.spec.cluster.world_size
            reasons = reasons or [
                f"no degrees are possible: {batch} sequences a step, the model's heads, its blocks and a sequence"
                f" can't be shared out evenly over {world} processes"
            ]
        return Found(
            chosen=None,
            reasons=tuple(reasons),
            runners_up=(),
            changes=(),
            front=(),
            others=(),
            nearest=near,
            limit_bytes=self.limit,
            possible=self.possible,
            looked_at=len({*self.peaks, *self.times}),
            unknown=self.unknown if near is None else "",
        )
