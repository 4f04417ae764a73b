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
from dataclasses import dataclass
from typing import Any

from hpcdl.parallel import auto
from hpcdl.plan import found as words
from hpcdl.plan import search_told
from hpcdl.plan.found import Found
from hpcdl.plan.records import Hardware
from hpcdl.plan.search_costs import Costs
from hpcdl.plan.search_remedies import Asked, remedies
from hpcdl.plan.search_space import Choice, space
from hpcdl.spec import ExperimentSpec

ALLOWED = auto.Config(name="auto").allow
"""What may be chosen besides degrees, where nobody says."""
SHARE = auto.Config(name="auto").memory_share
"""How much of a rank's memory the choice may fill, where nobody says."""
MOST = 6000
"""Choices that are looked at, at most; a bound on time, which has never been reached."""
Beyond = dict[tuple[str, bool], list[tuple[int, int]]]
"""For each recomputation and resharding what was too large: over how many ranks sharded, and with which micro-batch.
Sharded less, or with a larger micro-batch, it holds more."""
RUNNERS_UP = 5
"""Other meshes that are told."""
LEAST_IDLE = "zbv"
"""The schedule under which a pipeline idles least."""
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
    """What a mesh must stay below to be among those that are told, or be chosen because it is simpler."""
    times = sorted(value for value, _ in best.values())
    if len(times) <= RUNNERS_UP:
        return float("inf")
    return max(times[RUNNERS_UP], (1 + search_told.EQUAL) * times[0])


def _alike(mesh: Choice) -> tuple[object, ...]:
    """Meshes that differ in how far they shard alone have this in common."""
    other = mesh.strategy if mesh.strategy in auto.OFF_THE_MESH else ""
    return (mesh.pp, mesh.cp, mesh.tp, mesh.quant, mesh.dp_shard > 1, other)


def _is_beyond(choice: Choice, beyond: Beyond) -> bool:
    """Whether something that holds less was too large."""
    known = beyond.get((choice.checkpointing, choice.reshard), ())
    return any(choice.dp_shard <= shard and choice.micro_batch_size >= size for shard, size in known)


@dataclass(kw_only=True)
class _Search(Costs):
    """One search."""

    possible: int = 0
    """Choices that there are."""

    def run(self) -> Found:
        """Tries what costs little first."""
        for wide, offload in ((False, False), (False, True), (True, False), (True, True)):
            fitting = self._pass(wide=wide, offload=offload)
            if fitting:
                self._lean_ends(fitting)
                return search_told.chosen(self, fitting, self.possible, RUNNERS_UP)
        return search_told.nothing(self, self.possible)

    def leanest(self) -> tuple[Choice, float] | None:
        """The choice that holds least, and what it holds; None where none is known, or possible."""
        found: list[tuple[Choice, float]] = []
        for wide in (False, True):
            seen: set[tuple[object, ...]] = set()
            for mesh in self._meshes(wide=wide):
                if _alike(mesh) in seen or self.refused(mesh):
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
            if self.refused(mesh):
                continue
            beyond = large.setdefault(_alike(mesh), {})
            most, before = sharded_most[_alike(mesh)], level
            while (
                not offload and level < len(levels) and not self._may_fit(mesh, levels[level], most, beyond)
            ):
                level += 1
            if level == len(levels):
                continue
            if level > before:  # no quicker than with more recomputed: later, perhaps never
                queue.push(max(bound, self._quick(mesh, levels[level])), mesh, level)
                continue
            for size in self.ways.micro_batches(mesh.data_ranks):
                start = dataclasses.replace(mesh, checkpointing=levels[level], micro_batch_size=size)
                lean = self._lean(start)
                if not offload and _is_beyond(lean, beyond):
                    break
                own = best.get(mesh.mesh, (float("inf"),))[0]
                schedules = self._schedules(start, min(own, _worst(best)))
                if not schedules:
                    continue  # too few to fill a pipeline, or slower than what was found
                ways = self._offloading(lean) if offload else self._fitting(lean, beyond)
                if not ways:
                    break  # larger ones hold more
                for choice in self._scheduled(ways, schedules, own):
                    best[mesh.mesh] = (self.seconds(choice), choice)  # each is quicker than the one before
        return [choice for _, choice in best.values()]

    def _may_fit(self, mesh: Choice, recomputed: str, leanest: Choice, beyond: Beyond) -> bool:
        """Whether a mesh that recomputes so much may fit, by what is known of the one that shards most."""
        key = (recomputed, self.ways.reshards(mesh)[-1])
        lean = dataclasses.replace(leanest, checkpointing=recomputed, reshard=key[1])
        if not self.refused(leanest) and not self.fits(lean):
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

    def _schedules(self, start: Choice, limit: float) -> list[str]:
        """Those in which a step may take less than the limit, the quickest first."""
        quick = dataclasses.replace(start, reshard=self.ways.reshards(start)[0])
        if start.pp > 1 and self.ways.pipeline_refuses(quick):
            return []
        if start.pp > 1:
            best = dataclasses.replace(quick, schedule=LEAST_IDLE)
            possible = not self.ways.pipeline_refuses(best)
            if (self.seconds(best) if possible else self._bound(quick)) >= limit:
                return []
        times = {
            schedule: self.seconds(dataclasses.replace(quick, schedule=schedule))
            for schedule in self.ways.schedules(start)
        }
        return sorted((schedule for schedule, took in times.items() if took < limit), key=times.__getitem__)

    def _offloading(self, lean: Choice) -> list[Choice]:
        return [one for one in self._offloaded(lean) if self.fits(one)][:1]

    def _offloaded(self, choice: Choice) -> Iterator[Choice]:
        for one in self.ways.offloads(choice):
            if not self.refused(one):
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

    def _scheduled(self, ways: list[Choice], schedules: list[str], limit: float) -> Iterator[Choice]:
        """What fits and takes less than the limit, in these schedules; of each no more than is needed."""
        for schedule in schedules:
            for one in ways:
                choice = dataclasses.replace(one, schedule=schedule)
                if choice.pp > 1 and self.ways.pipeline_refuses(choice):
                    break
                if self.seconds(choice) < limit and self.fits(choice):
                    yield choice
                    limit = self.seconds(choice)

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
            if not self.refused(lean):
                self.judged(lean)
