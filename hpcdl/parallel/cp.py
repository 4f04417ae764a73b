"""Context parallel: ranks share a sequence, each holds some of its tokens; attention sees them all.

`allgather`: keys and values of the whole sequence are gathered by every rank, as Llama 3 was trained
(Dubey et al., "The Llama 3 Herd of Models", 2024, section 3.3.2). `ulysses`: all-to-all swaps sequence for
heads around the attention (Jacobs et al., "DeepSpeed Ulysses", 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from hpcdl.errors import Fault
from hpcdl.parallel import _mesh
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.model import MOVING_ROPE
from hpcdl.spec.parallel import ParallelDims
from hpcdl.spec.traffic import Sent, Sizes

Config = _mesh.MeshConfig
check = _mesh.check
traffic = _mesh.traffic
build = _mesh.build
memory = _mesh.memory


def faults(config: _mesh.MeshConfig, dims: ParallelDims, spec: ExperimentSpec) -> Iterator[Fault]:
    """The sequence, and with Ulysses the heads, must divide by the degree; positions must be absolute."""
    if dims.cp == 1:
        return
    if spec.data.seq_len % dims.cp:
        yield _mesh.does_not_divide("cp", dims.cp, "data.seq_len", spec.data.seq_len)
    shape = spec.model.shape
    if shape is None:
        return
    heads = shape.num_attention_heads // dims.tp
    if config.cp_method == "ulysses" and heads % dims.cp:
        whose = "the model's num_attention_heads" if dims.tp == 1 else "num_attention_heads / tp"
        yield _mesh.does_not_divide("cp", dims.cp, whose, heads)
    scaling = str((shape.rope_scaling or {}).get("rope_type"))
    if scaling in MOVING_ROPE:
        yield Fault(
            key="parallel.cp",
            value=str(dims.cp),
            problem=f"the rotary scaling {scaling} depends on the longest position that a rank sees, "
            "and ranks with other parts of a sequence see others",
            allowed="1, or a scaling that is the same for all positions (linear, llama3, yarn)",
            fix="parallel.cp=1",
        )


def sent(config: _mesh.MeshConfig, sizes: Sizes) -> Iterator[Sent]:
    """Keys and values of the whole sequence, and on the way back their gradients in fp32; or heads for tokens."""
    dims, calls = sizes.dims, sizes.blocks * sizes.micro_batches
    if dims.cp == 1:
        return
    message = partial(Sent, dimension="cp", ranks=dims.cp, stride=dims.tp)
    if config.cp_method == "ulysses":
        repeats = math.lcm(dims.cp, max(1, sizes.kv_heads)) // max(1, sizes.kv_heads)
        there = sizes.query_width + sizes.kv_width * repeats
        for what, numbers in (
            ("queries, keys and values", there),
            ("attention's results", sizes.query_width),
        ):
            yield message(
                what=f"all-to-all of {what}",
                kind="all_to_all",
                calls=calls * (sizes.passes + 1),
                size=sizes.tokens * numbers * sizes.compute,
            )
        return
    whole = sizes.tokens * dims.cp * sizes.kv_width
    yield message(
        what="all-gather of keys and values",
        kind="all_gather",
        calls=calls * sizes.passes,
        size=whole * sizes.compute,
    )
    yield message(
        what="reduce-scatter of their gradients",
        kind="reduce_scatter",
        calls=calls,
        size=whole * 4,
    )
