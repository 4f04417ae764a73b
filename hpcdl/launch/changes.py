"""What would make a run fit: changes tried out with the planner itself, each given as the very overrides to type.

Changes that train the same go before those that train something else, a shorter sequence is the last resort; what is
shown is ordered by what it costs: process-seconds a token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hpcdl import compress, experiment
from hpcdl.experiment import words
from hpcdl.launch.compose import Composer
from hpcdl.launch.sweep import Point
from hpcdl.plan import hardware
from hpcdl.plan.records import Plan
from hpcdl.plan.units import gib, seconds
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.parallel import ParallelDims

SHOWN = 3
FILLED = 0.95
"""Of the memory what a change that is named may fill: a plan is not exact."""
MOST_TRIED = 60
"""Changes that are tried out, at most: the launcher answers within a second or two."""
MOST_NODES = 1024
SHORTEST = 128
"""Tokens: a sequence below that is no help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing that may be changed."""

    overrides: tuple[str, ...]
    rank: int = 0
    """0: it trains the same; 1: it trains something else, or rounds otherwise; 2: the last resort."""
    what: str = ""
    """What else it changes, in words."""

    @property
    def keys(self) -> frozenset[str]:
        """The keys that it sets."""
        return frozenset(text.partition("=")[0] for text in self.overrides)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A change with which the run fits."""

    change: Change
    plan: Plan
    cost: float | None
    """Process-seconds a token; None: not known."""


Planner = Callable[[ExperimentSpec], Plan]


def found(point: Point, plan: Planner, composer: Composer) -> tuple[str, ...]:
    """The cheapest changes that make a point fit, a line each; none where nothing that was tried does.

    Args:
        point: what doesn't fit.
        plan: the planner.
        composer: makes the config of each change.
    """
    before = plan(point.spec)
    fit: list[Tried] = []
    singles = list(singles_of(point.spec))
    for enough in (_goes_further, _is_the_same):  # what is more than enough is named where little else is
        for change in itertools.islice(_in_turn(singles), MOST_TRIED):
            as_good = sum(one.change.rank <= change.rank for one in fit)
            if as_good >= SHOWN and len(change.overrides) > 1:
                break
            if enough(change, fit):
                continue
            one = _tried(change, point, plan, composer)
            if one is not None:
                fit.append(one)
        if len(fit) >= SHOWN:
            break
    if not fit:
        fit += _all_that_it_takes(singles, point, plan, composer)
    chosen = sorted(fit, key=lambda one: (one.change.rank, _cost(one)))[:SHOWN]
    chosen = [_milder(one, singles, point, plan, composer) for one in chosen]
    chosen.sort(key=lambda one: (one.change.rank == 2, _cost(one)))
    return tuple(in_words(one, before) for one in chosen)


def _all_that_it_takes(
    singles: Sequence[Change], point: Point, plan: Planner, composer: Composer
) -> Iterator[Tried]:
    """As many changes together as a run needs that is far too big: all that go together, less those it does without."""
    kept: list[Change] = []
    for change in sorted(_leanest(singles), key=lambda one: (one.rank, -len(one.keys))):
        apart = not any(change.keys & other.keys for other in kept)
        if apart and _composed(_joined([*kept, change]), point, composer) is not None:
            kept.append(change)
    tried = _tried(_joined(kept), point, plan, composer) if kept else None
    if tried is None:
        return
    for change in sorted(kept, key=lambda one: one.rank, reverse=True):
        fewer = [other for other in kept if other is not change]
        enough = _tried(_joined(fewer), point, plan, composer) if fewer else None
        if enough is not None:
            kept, tried = fewer, enough
    yield tried


def _milder(one: Tried, singles: Sequence[Change], point: Point, plan: Planner, composer: Composer) -> Tried:
    """Of several changes together each goes only as far as it must: the last step was tried first."""
    if len(one.change.overrides) < 2:
        return one
    for single in singles:
        (text, *more) = single.overrides
        key = text.partition("=")[0]
        if more or key not in _STEPWISE or key not in one.change.keys or text in one.change.overrides:
            continue
        words_ = tuple(text if each.startswith(f"{key}=") else each for each in one.change.overrides)
        change = Change(overrides=words_, rank=one.change.rank, what=one.change.what)
        tried = _tried(change, point, plan, composer)
        if tried is not None:
            return tried
    return one


def _cost(one: Tried) -> float:
    return math.inf if one.cost is None else one.cost


def _goes_further(change: Change, fit: Sequence[Tried]) -> bool:
    """Whether it is more of a change that is enough already: fewer tokens, more nodes, something else besides."""
    return any(
        one.change.keys <= change.keys
        and (one.change.keys <= _STEPWISE or set(one.change.overrides) <= set(change.overrides))
        for one in fit
    )


def _is_the_same(change: Change, fit: Sequence[Tried]) -> bool:
    """Whether it is the same with other figures, or with something else besides."""
    return any(
        one.change.keys == change.keys
        or set(one.change.overrides) <= set(change.overrides)
        or (one.change.keys == {"cluster.mem_gb"} and one.change.keys < change.keys)
        for one in fit
    )


_STEPWISE = frozenset(
    {
        "data.seq_len",
        "trainer.micro_batch_size",
        "cluster.mem_gb",
        "cluster.nodes",
        "cluster.processes_per_node",
        "parallel.tp",
    }
)


def singles_of(spec: ExperimentSpec) -> Iterator[Change]:
    """What may be changed by itself, roughly the cheapest first; rules refuse what doesn't go together."""
    yield from _of_memory(spec)
    yield from _of_steps(spec)
    yield from _of_ranks(spec)
    yield from _of_another_training(spec)
    length = spec.data.seq_len // 2
    while length >= SHORTEST:
        yield Change(
            overrides=(f"data.seq_len={length}",), rank=2, what="shorter sequences, fewer tokens a step"
        )
        length //= 2


def _of_memory(spec: ExperimentSpec) -> Iterator[Change]:
    """More of the node's memory, where not all of it was asked for."""
    cluster = spec.cluster
    if hardware.on_gpus(cluster) or (cluster.kind == "local" and cluster.mem_gb is None):
        return
    whole = hardware.whole_node(cluster)
    asked = cluster.mem_gb or 0.0
    size = 2.0 ** math.ceil(math.log2(max(asked, 1.0) * 1.01))
    while whole.value is not None and size * 2**30 <= whole.value:
        yield Change(overrides=(f"cluster.mem_gb={size:g}",), what="memory that the node has")
        size *= 2
    if whole.value is not None and (most := math.floor(whole.value / 2**30)) > asked:
        yield Change(overrides=(f"cluster.mem_gb={most}",), what="memory that the node has")


def _of_steps(spec: ExperimentSpec) -> Iterator[Change]:
    """The same step in smaller pieces, or computed twice."""
    trainer = spec.trainer
    for way in {"none": ("selective", "full"), "selective": ("full",), "full": ()}[
        trainer.activation_checkpointing
    ]:
        yield Change(overrides=(f"trainer.activation_checkpointing={way}",), what="blocks computed again")
    size = trainer.micro_batch_size // 2
    while size:
        yield Change(overrides=(f"trainer.micro_batch_size={size}",), what="same batch, more accumulation")
        size //= 2
    if hardware.on_gpus(spec.cluster) and trainer.activation_offload == "none":
        yield Change(
            overrides=("trainer.activation_checkpointing=full", "trainer.activation_offload=host"),
            what="activations in the host's memory",
        )


def _of_ranks(spec: ExperimentSpec) -> Iterator[Change]:
    """Parameters shared by the ranks there are, or by more."""
    cluster, parallel = spec.cluster, spec.parallel
    dims = ParallelDims.possible(parallel, cluster.world_size)
    sharded = parallel.dp_shard != 1
    if parallel.name == "ddp" and cluster.world_size > 1:
        yield Change(overrides=("parallel=fsdp",), what="parameters shared by all processes")
    if sharded or parallel.name == "ddp":
        offload = "parallel.cpu_offload=true"
        if hardware.on_gpus(cluster):
            shared = (offload,) if sharded else ("parallel=fsdp", offload)
            yield Change(overrides=shared, what="shards in the host's memory")
    if hardware.on_gpus(cluster) and dims is not None and dims.tp == 1:
        for degree in (2, 4, 8):
            if cluster.processes_per_node % degree == 0:
                yield Change(overrides=(f"parallel.tp={degree}",), what="matrices shared inside a node")
    if not hardware.on_gpus(cluster):
        count = cluster.processes_per_node // 2
        while count >= 1:
            yield Change(
                overrides=(f"cluster.processes_per_node={count}",), what="fewer share a node's memory"
            )
            count //= 2
    if cluster.kind == "slurm":
        nodes = 2 * cluster.nodes
        while nodes <= min(MOST_NODES, 16 * cluster.nodes):
            more = f"cluster.nodes={nodes}"
            yield Change(overrides=(more,) if sharded else ("parallel=fsdp", more), what="more nodes")
            nodes *= 2


def _of_another_training(spec: ExperimentSpec) -> Iterator[Change]:
    """Numbers of fewer bits, or fewer of them trained."""
    frozen = compress.freezes_base(spec)
    if spec.trainer.precision == "fp32":
        yield Change(overrides=("trainer.precision=bf16",), rank=1, what="passes in 16 bits")
    if spec.optim.name == "adamw" and not frozen:
        yield Change(overrides=("optim=adamw8bit",), rank=1, what="moments in 8 bits")
    if spec.train == "full" or spec.model.shape is None:
        return
    if not frozen:
        yield Change(overrides=("peft=lora",), rank=1, what="trains adapters only")
        yield Change(overrides=("peft=lora", "quant=nf4"), rank=1, what="trains adapters on 4-bit weights")
    elif spec.quant.scheme == "none":
        yield Change(overrides=("quant=nf4",), rank=1, what="the base in 4 bits")


def _in_turn(singles: Sequence[Change]) -> Iterator[Change]:
    """Each by itself, then pairs, then the leanest of each kind together."""
    yield from singles
    strong = [one for one in singles if one.overrides[-1].split("=")[-1] not in ("selective",)]
    for first, second in itertools.combinations(_leanest(strong), 2):
        yield from _together((first, second))
    for three in itertools.combinations(_leanest(strong), 3):
        yield from _together(three)


def _leanest(singles: Sequence[Change]) -> list[Change]:
    """Of changes of the same keys the last: it goes furthest."""
    return list({one.keys: one for one in singles}.values())


def _together(changes: Sequence[Change]) -> Iterator[Change]:
    keys = [key for change in changes for key in change.keys]
    if len(keys) == len(set(keys)):
        yield _joined(changes)


def _joined(changes: Sequence[Change]) -> Change:
    return Change(
        overrides=tuple(text for change in changes for text in change.overrides),
        rank=max(change.rank for change in changes),
        what="; ".join(change.what for change in changes),
    )


def _composed(change: Change, point: Point, composer: Composer) -> ExperimentSpec | None:
    """The point with a change; None where the rules refuse it."""
    overrides, faults = composer.parse(change.overrides)
    if point.plain is not None:
        # Its files are on another machine: what chooses another file can't be tried here.
        if any(composer.is_choice(override) for override in overrides):
            return None
        composed = composer.changed(dict(point.plain), overrides)
    else:
        groups = {override.key_or_group for override in overrides}
        kept = [each for each in point.overrides if each.key_or_group not in groups]
        composed = composer.compose([*kept, *overrides])
    if faults or composed.faults:
        return None
    return experiment.check(composed.plain).spec


def _tried(change: Change, point: Point, plan: Planner, composer: Composer) -> Tried | None:
    """The change's plan, if it can be and fits."""
    spec = _composed(change, point, composer)
    if spec is None:
        return None
    planned = plan(spec)
    peak, room = planned.peak, planned.hardware.device.memory_bytes
    if peak is None or room is None or peak.peak > FILLED * room:
        return None
    step = planned.time
    cost = None if step is None else step.step_s * planned.world_size / step.tokens
    return Tried(change=change, plan=planned, cost=cost)


def in_words(one: Tried, before: Plan) -> str:
    """`trainer.activation_checkpointing=full  (5.1 GiB a process; step 1.9 s, 31 % more; blocks computed again)`."""
    peak, step, was = one.plan.peak, one.plan.time, before.time
    parts = [f"{gib(peak.peak)} a process"] if peak else []
    if step is not None:
        parts.append(f"step {seconds(step.step_s)}{_more(step.step_s, was.step_s) if was else ''}")
    typed = " ".join(words.shell(text) for text in one.change.overrides)
    return f"{typed}  ({'; '.join([*parts, one.change.what])})"


def _more(step_s: float, before_s: float) -> str:
    share = 100 * (step_s / before_s - 1)
    return f", {abs(share):.0f} % {'more' if share > 0 else 'less'}" if abs(share) >= 0.5 else ", as quick"
