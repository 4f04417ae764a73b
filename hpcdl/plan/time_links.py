"""What messages between ranks cost: latency of each hop and bytes over the slowest link of the way.

Rings and trees: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", 2005;
NCCL takes the quicker of the two. A group that lies on several nodes with k ranks on each has k of a node's links for
itself: NCCL makes a ring for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from hpcdl.plan.records import Hardware, Traffic
from hpcdl.spec.traffic import Behind, Sent

HOP_OPERATIONS = 12
"""Operations (Device.operation_s) that Python and torch take to begin a collective and to wait for it."""

HIDDEN = 0.85
"""Of what passes behind computing: NCCL's kernels take some of the SMs meanwhile (16 to 24 of an H100's 132)."""


def members(ranks: int, stride: int, ranks_per_node: int) -> int:
    """Of a group how many are on the same node, at least; ranks of a node are neighbours."""
    return max(1, min(ranks, ranks_per_node // max(1, stride)))


def seconds(sent: Sent, hardware: Hardware) -> float:
    """Of one call, if nothing else went on."""
    ranks = sent.ranks
    if ranks <= 1 or not sent.calls:
        return 0.0
    links, inside = hardware.links, members(ranks, sent.stride, hardware.ranks_per_node)
    crossing = hardware.nodes > 1 and ranks > inside
    inside = inside if crossing else ranks
    share = hardware.device.share if hardware.device.kind == "cpu" else 1.0
    near, far = links.inside_latency_s / share, links.between_latency_s / share
    bandwidth = links.inside_bytes_per_s * share
    if crossing:
        bandwidth = min(bandwidth, inside * links.between_bytes_per_s)
    hop = far if crossing else near
    if sent.kind == "send":
        return hop + sent.size / (min(bandwidth, links.between_bytes_per_s) if crossing else bandwidth)
    if sent.kind == "serve":  # each worker's in turn, over the one link that the server has
        return 2 * hop + (ranks - 1) * sent.size / (links.between_bytes_per_s if crossing else bandwidth)
    nodes = ranks / inside
    ring = (ranks - nodes) * near + (nodes - 1) * far
    part = (ranks - 1) / ranks * sent.size / bandwidth
    if sent.kind in ("all_gather", "all_to_all"):
        return ring + part
    if sent.kind == "reduce_scatter" and hardware.device.kind == "cuda":
        return ring + part
    # gloo makes a reduce-scatter of an all-reduce
    tree = 2 * (math.ceil(math.log2(inside)) * near + math.ceil(math.log2(nodes)) * far)
    return min(2 * (ring + part), tree + 2 * sent.size / bandwidth)


def carried(sent: Sent) -> float:
    """Bytes that a rank sends in one call."""
    ranks = sent.ranks
    if sent.kind == "all_reduce":
        return 2 * (ranks - 1) / ranks * sent.size
    if sent.kind in ("all_gather", "reduce_scatter", "all_to_all"):
        return (ranks - 1) / ranks * sent.size
    return sent.size


def priced(messages: Iterable[Sent], hardware: Hardware, budgets: dict[Behind, float]) -> tuple[Traffic, ...]:
    """Each message with its seconds, and what of them passes behind computing.

    What is waited for can't hide: the first call of a kind, or whatever exceeds the computing beside it. On CPUs
    gloo's threads need the very cores that compute; there only what waits for a network between nodes hides.

    Args:
        messages: of a step.
        hardware: the links.
        budgets: seconds of computing that messages may pass behind; what is left of them afterwards.
    """
    found = []
    for sent in messages:
        each = seconds(sent, hardware)
        total = each * sent.calls
        hidden = 0.0
        if sent.behind != "nothing" and sent.calls > 1 and _hides(sent, hardware):
            hidden = HIDDEN * min(total - each, max(0.0, budgets.get(sent.behind, 0.0)))
            for name in SHARED[sent.behind]:
                budgets[name] = budgets.get(name, 0.0) - hidden
        found.append(
            Traffic(
                what=sent.what,
                dimension=sent.dimension,
                ranks=sent.ranks,
                calls=sent.calls,
                bytes=carried(sent) * sent.calls if sent.ranks > 1 else 0.0,
                seconds=total,
                hidden=hidden,
            )
        )
    return tuple(found)


SHARED: dict[Behind, tuple[Behind, ...]] = {
    "nothing": (),
    "forward": ("forward",),
    "backward": ("backward", "last backward"),
    "last backward": ("backward", "last backward"),
}
"""Two messages can't hide behind the same computing."""


def _hides(sent: Sent, hardware: Hardware) -> bool:
    if hardware.device.kind == "cuda":
        return True
    crossing = sent.ranks > members(sent.ranks, sent.stride, hardware.ranks_per_node)
    return crossing and hardware.nodes > 1 and sent.kind == "all_reduce"
