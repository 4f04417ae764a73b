"""What a search has found: the choice, those that it won against and why, and the front of speed and memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hpcdl.parallel.auto import OFF_THE_MESH
from hpcdl.plan.records import RankMemory, StepTime
from hpcdl.plan.search_space import TRAINER, Choice
from hpcdl.plan.units import gib
from hpcdl.spec import ExperimentSpec

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One choice, and what it would cost."""

    choice: Choice
    spec: ExperimentSpec
    """The experiment with it: what launch would accept."""
    memory: tuple[RankMemory, ...]
    """One for each pipeline stage."""
    time: StepTime
    limit_bytes: int | None
    """What a rank may hold; None: nobody has said."""

    @property
    def peak_bytes(self) -> int:
        """Of the rank that holds most."""
        return max(rank.peak for rank in self.memory)

    @property
    def over_bytes(self) -> int:
        """What it holds beyond the limit; 0 where it fits."""
        return 0 if self.limit_bytes is None else max(0, self.peak_bytes - self.limit_bytes)

    @property
    def fits(self) -> bool:
        """Whether every rank stays within the limit."""
        return not self.over_bytes

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.time.step_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A choice that was not taken."""

    judged: Judged
    why: str
    """`12 % slower`, `doesn't fit by 3.2 GiB`, …"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The end of a search."""

    chosen: Judged | None
    """The quickest that fits, or one as quick that is simpler; None: nothing fits, or nothing could be judged."""
    reasons: tuple[str, ...]
    """Why it was chosen, or why nothing was, a sentence each."""
    runners_up: tuple[Lost, ...]
    """The best of other meshes, quickest first."""
    changes: tuple[Lost, ...]
    """The chosen one with one setting changed."""
    front: tuple[Judged, ...]
    """Those that fit and are beaten by none in both step time and memory, quickest first."""
    others: tuple[Judged, ...]
    """All others that were judged in both."""
    nearest: Judged | None
    """Where nothing fits: what comes nearest."""
    remedies: tuple[str, ...] = ()
    """Where nothing fits: what to type so that something does."""
    limit_bytes: int | None
    """Bytes that a rank may hold, headroom left; None: nobody has said."""
    possible: int
    """Choices that there are."""
    looked_at: int
    """Of these, those whose memory or time was worked out; the others can't be better than those."""
    unknown: str = ""
    """Why nothing could be judged."""

    def json(self) -> dict[str, object]:
        """For scripts."""
        return {
            "chosen": self.chosen and as_json(self.chosen),
            "overrides": list(overrides(self.chosen.choice)) if self.chosen else None,
            "reasons": list(self.reasons),
            "runners_up": [{**as_json(lost.judged), "why": lost.why} for lost in self.runners_up],
            "changes": [{**as_json(lost.judged), "why": lost.why} for lost in self.changes],
            "front": [as_json(judged) for judged in self.front],
            "nearest": self.nearest and as_json(self.nearest),
            "remedies": list(self.remedies),
            "limit_bytes": self.limit_bytes,
            "possible": self.possible,
            "looked_at": self.looked_at,
            "unknown": self.unknown,
        }


def as_json(judged: Judged) -> dict[str, object]:
    """One choice for scripts."""
    return {
        "overrides": list(overrides(judged.choice)),
        "step_s": judged.step_s,
        "tokens_per_s": judged.time.tokens_per_s,
        "mfu": judged.time.mfu,
        "peak_bytes": judged.peak_bytes,
        "over_bytes": judged.over_bytes,
        "fits": judged.fits,
    }


# --- in words -------------------------------------------------------------------------------------------------


def overrides(choice: Choice) -> tuple[str, ...]:
    """What to type for this choice: everything that the search may set, as it is."""
    words = [f"parallel={choice.strategy}"]
    if choice.strategy in ("ddp", "fsdp", "hsdp", "tp", "pp", "cp"):
        names = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
        words += [f"parallel.{name}={getattr(choice, name)}" for name in names]
        words += [f"parallel.reshard_after_forward={str(choice.reshard).lower()}"] * (choice.dp_shard > 1)
        words += [f"parallel.schedule={choice.schedule}"] * (choice.pp > 1)
        words += ["parallel.cpu_offload=true"] * choice.cpu_offload
    words += [
        f"trainer.{key}={value}"
        for key, name in TRAINER.items()
        if (value := getattr(choice, name)) != "none" or key == "activation_checkpointing"
    ]
    return (*words, *([f"quant={choice.quant}"] if choice.quant != "none" else []))


def name(choice: Choice, times: str = "×") -> str:
    """A choice's mesh in a few characters: `pp 2 × fsdp 8 × tp 8`; with an empty `times` `pp2 fsdp8 tp8`."""
    if not choice.degrees:
        return "one process"
    shown = {"dp_replicate": "copies" if times else "dp", "dp_shard": "fsdp"}
    if choice.strategy in ("ddp", *OFF_THE_MESH):
        shown = {"dp_replicate": choice.strategy}
    gap = " " if times else ""
    parts = [f"{shown.get(key, key)}{gap}{degree}" for key, degree in choice.degrees.items()]
    return (f" {times} " if times else " ").join(parts)


def details(choice: Choice) -> str:
    """What else was chosen: `micro-batch 2, full checkpointing, 1f1b`."""
    parts = [f"micro-batch {choice.micro_batch_size}"]
    if choice.checkpointing != "none":
        parts.append(f"{choice.checkpointing} checkpointing")
    return ", ".join((*parts, *more(choice)))


def more(choice: Choice) -> list[str]:
    """Of that what isn't batch and recomputation."""
    parts = []
    if choice.pp > 1:
        parts.append(choice.schedule)
    if choice.dp_shard > 1:
        parts.append("resharded" if choice.reshard else "gathered")
    if choice.cpu_offload:
        parts.append("shards on the host")
    if choice.activation_offload != "none":
        parts.append("activations on " + {"host": "the host", "disk": "disk"}[choice.activation_offload])
    if choice.quant != "none":
        parts.append(choice.quant)
    return parts


def why_lost(judged: Judged, best: Judged) -> str:
    """What the best one does better."""
    if judged.choice == best.choice:
        return "chosen"
    more = judged.step_s / best.step_s - 1
    speed = f"{100 * abs(more):.{0 if abs(more) >= 0.095 else 1}f} %"
    if judged.over_bytes:
        quicker = f"{speed} quicker, but " if more < -0.005 else ""
        return f"{quicker}{gib(judged.over_bytes)} too large"
    if more >= 1:
        return f"takes {1 + more:.1f} times as long"
    if more > 0.01:
        return f"{speed} slower"
    simpler = "less simple" if judged.choice.effort > best.choice.effort else "holds more"
    if judged.peak_bytes <= best.peak_bytes and simpler == "holds more":
        simpler = "of another kind"
    return f"{'equally quick' if abs(more) < 0.0005 else f'{speed} {_direction(more)}'}, {simpler}"


def _direction(more: float) -> str:
    return "slower" if more > 0 else "quicker"


def front(judged: Iterable[Judged]) -> tuple[Judged, ...]:
    """Those that fit and that no other beats in both step time and peak memory, quickest first."""
    kept: list[Judged] = []
    for one in sorted(judged, key=lambda one: (one.step_s, one.peak_bytes)):
        if one.fits and (not kept or one.peak_bytes < kept[-1].peak_bytes):
            kept.append(one)
    return tuple(kept)


def spread(judged: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly, with both ends."""
    if len(judged) <= most:
        return list(judged)
    return [judged[round(place * (len(judged) - 1) / (most - 1))] for place in range(most)]
