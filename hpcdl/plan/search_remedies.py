"""Where nothing fits: what would make it fit, each found by asking again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hpcdl import compress
from hpcdl.parallel.auto import ALLOWED, OFF_THE_MESH
from hpcdl.plan.found import details, name
from hpcdl.plan.records import Hardware
from hpcdl.plan.search_space import Choice
from hpcdl.plan.units import gib
from hpcdl.spec import ExperimentSpec

MOST_NODES = 4096
SHORTEST = 128
"""Tokens: a sequence below that is no remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A search as it was asked for."""

    spec: ExperimentSpec
    hardware: Hardware
    allow: frozenset[str]
    room: int | None
    """Bytes of a rank's memory."""
    share: float
    """Of it what may be filled."""


Leanest = Callable[[Asked], tuple[Choice, float] | None]
"""The choice that holds least under what is asked, and its peak; None where none is known."""


def remedies(asked: Asked, leanest: Leanest) -> tuple[str, ...]:
    """What to type so that something fits, the least change first, and what would then be there.

    Args:
        asked: what didn't fit.
        leanest: asks again.
    """
    found = []
    for typed, changed in _changes(asked):
        lean = leanest(changed)
        if lean is not None and changed.room is not None and lean[1] <= changed.share * changed.room:
            choice, peak = lean
            found.append(f"{typed}  ({name(choice)}, {details(choice)}: {gib(peak)})")
    if asked.spec.cluster.kind == "slurm":
        found += _more_nodes(asked, leanest)
    return tuple(found)


def _changes(asked: Asked) -> Iterator[tuple[str, Asked]]:
    spec = asked.spec
    if asked.share < 1:
        yield "parallel.memory_share=1", dataclasses.replace(asked, share=1.0)
    for name_ in ALLOWED:
        if name_ in asked.allow or name_ in OFF_THE_MESH:
            continue
        if name_ == "quantization" and not compress.freezes_base(spec):
            continue
        allow = sorted({*asked.allow, name_}, key=list(ALLOWED).index)
        typed = f"'parallel.allow=[{','.join(allow)}]'"
        yield typed, dataclasses.replace(asked, allow=frozenset(allow))
    length = spec.data.seq_len // 2
    while length >= SHORTEST:
        shorter = dataclasses.replace(spec, data=dataclasses.replace(spec.data, seq_len=length))
        yield f"data.seq_len={length}", dataclasses.replace(asked, spec=shorter)
        length //= 4
    if spec.peft.name == "none" and spec.train != "full":
        method = compress.get("lora").Config(name="lora")
        yield "peft=lora", dataclasses.replace(asked, spec=dataclasses.replace(spec, peft=method))


def _more_nodes(asked: Asked, leanest: Leanest) -> list[str]:
    """The least doubling of nodes with which something fits."""
    cluster = asked.spec.cluster
    nodes = 2 * cluster.nodes
    while nodes <= MOST_NODES:
        larger = dataclasses.replace(
            asked,
            spec=dataclasses.replace(asked.spec, cluster=dataclasses.replace(cluster, nodes=nodes)),
            hardware=dataclasses.replace(asked.hardware, nodes=nodes),
        )
        lean = leanest(larger)
        if lean is not None and asked.room is not None and lean[1] <= asked.share * asked.room:
            return [f"cluster.nodes={nodes}  ({name(lean[0])}, {details(lean[0])}: {gib(lean[1])})"]
        nodes *= 2
    return []
