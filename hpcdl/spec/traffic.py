"""What a strategy says that ranks send one another in a step; hpcdl.plan.time says how long that takes.

Arithmetic only, like hpcdl.spec.layout: the login node plans with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpcdl.spec.parallel import ParallelDims

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "serve"]
"""`send`: to one other rank; `serve`: to a server that answers all ranks, one after the other."""
Behind = Literal["nothing", "forward", "backward", "last backward"]
"""Which computing goes on meanwhile: that of no pass, of every micro-batch's, or of the last one's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a step of one rank is made of, as strategies need it: the busiest rank's where they differ."""

    dims: ParallelDims
    """The degrees."""
    tokens: int
    """Of a micro-batch on this rank."""
    micro_batches: int
    """Of a step on this rank."""
    blocks: float
    """On this rank."""
    width: int
    """Of the residual stream."""
    kv_width: float
    """Numbers a token of keys and values together, of this rank's heads."""
    kv_heads: int
    """Of this rank."""
    query_width: float
    """Numbers a token of queries, of this rank's heads."""
    compute: int
    """Bytes of a number in a pass."""
    residual: int
    """Bytes of a number of the residual stream."""
    block_weights: float
    """Numbers of a block that are gathered where they are sharded: this rank's part under tensor parallel."""
    block_bytes: float
    """Bytes in which they are gathered."""
    end_weights: float
    """Numbers of embedding, head and last norm on this rank, likewise."""
    end_bytes: float
    """Bytes in which they are gathered."""
    trained: float
    """Trained numbers on this rank before they are sharded over data."""
    tied: float
    """Numbers of a trained embedding that a pipeline has twice; 0 where it has none."""
    state: float
    """Numbers of optimizer state for each of them."""
    passes: float
    """Forward passes of a block a micro-batch: 2 where all are computed again in the backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One kind of message of a step, as one rank sees it."""

    what: str
    """`all-reduce of gradients`, …"""
    dimension: str
    """The mesh's dimension, or the strategy's own word."""
    kind: Collective
    """How."""
    ranks: int
    """That take part."""
    stride: int = 1
    """How far apart in rank neighbours of the group are."""
    calls: float
    """A step."""
    size: float
    """Bytes of a call: of an all-gather its output, of a reduce-scatter its input, else what a rank has."""
    behind: Behind = "nothing"
    """What it may pass behind."""
