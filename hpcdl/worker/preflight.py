"""The workers' part of preflight: what the links between the job's nodes carry, told before the first step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hpcdl.errors import NotFitError
from hpcdl.runs.store import RunDir
from hpcdl.spec import PreflightSpec
from hpcdl.worker.process import Process

_ROUNDS = 3


def links(spec: PreflightSpec, run: RunDir, who: Process, device: torch.device) -> None:
    """Each node's first rank sends to the next node's, all at once; then an all-reduce over them.

    The event tells what each node's link carries, and whose carries least: the better one of its two neighbours'
    views, since a slow node is slow to both of them. All ranks call it; on one node nothing is done.

    Raises:
        NotFitError: a node's link is slower than `preflight.min_mib_per_s`.
    """
    if spec.name == "none" or not spec.allreduce_mib or who.world_size == who.local_world_size:
        return
    firsts = list(range(0, who.world_size, who.local_world_size))
    group = dist.new_group(firsts)
    seen: list[Seen] = []
    if who.rank in firsts:
        seen = _measure(spec, who, firsts, group, device)
    said: list[list[Seen]] = [seen]
    dist.broadcast_object_list(said, src=0)
    by_node = carried(said[0], spec.allreduce_mib)
    slowest = min(by_node, key=lambda node: by_node[node])
    if who.is_first:
        # In a ring each node sends 2 (n - 1) / n of what is added up.
        sent_mib = 2 * (len(firsts) - 1) / len(firsts) * spec.allreduce_mib
        run.event(
            "preflight",
            allreduce_mib_per_s=round(sent_mib / max(one.together_s for one in said[0]), 1),
            links_mib_per_s=by_node,
            slowest=slowest,
            sent_mib=spec.allreduce_mib,
        )
    if spec.min_mib_per_s is not None and by_node[slowest] < spec.min_mib_per_s:
        lacking = (
            f"its link carries {by_node[slowest]:g} MiB/s, preflight.min_mib_per_s={spec.min_mib_per_s:g}"
        )
        raise NotFitError(slowest, [lacking])


@dataclass(frozen=True, slots=True)
class Seen:
    """What one node's first rank has measured."""

    node: str
    received_s: float
    """Until all was there that the node before it sent."""
    together_s: float
    """The all-reduce."""


def carried(seen: Sequence[Seen], sent_mib: float) -> dict[str, float]:
    """MiB/s by node; each sends to the next, the last one to the first."""
    return {
        one.node: round(sent_mib / min(one.received_s, after.received_s), 1)
        for one, after in zip(seen, [*seen[1:], seen[0]], strict=True)
    }


def _measure(
    spec: PreflightSpec, who: Process, firsts: list[int], group: dist.ProcessGroup, device: torch.device
) -> list[Seen]:
    numbers = torch.ones(max(1, round(spec.allreduce_mib * 2**20 / 4)), device=device)
    received = torch.empty_like(numbers)
    place = firsts.index(who.rank)
    after, before = firsts[(place + 1) % len(firsts)], firsts[place - 1]

    def around() -> float:
        started = time.perf_counter()
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, numbers, after, group), dist.P2POp(dist.irecv, received, before, group)]
        )
        works[-1].wait()  # what is received; NCCL has one for both
        took = _since(started, device)
        works[0].wait()
        return took

    def together() -> float:
        started = time.perf_counter()
        dist.all_reduce(received, group=group)
        return _since(started, device)

    # The quickest counts: the first one opens connections.
    mine = Seen(who.node, min(around() for _ in range(_ROUNDS)), min(together() for _ in range(_ROUNDS)))
    everyone: list[Seen] = [mine] * len(firsts)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def _since(started: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.perf_counter() - started, 1e-9)
