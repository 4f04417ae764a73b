"""Tensor parallel: each rank holds some columns or rows of every matrix, and some heads of the attention.

Source: Shoeybi et al., "Megatron-LM", 2019; with sequence parallel: Korthikanti et al., "Reducing
Activation Recomputation in Large Transformer Models", MLSys 2023, section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from hpcdl.errors import Fault
from hpcdl.parallel import _mesh
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.parallel import ParallelDims
from hpcdl.spec.traffic import Collective, Sent, Sizes

Config = _mesh.MeshConfig
check = _mesh.check
traffic = _mesh.traffic
build = _mesh.build
memory = _mesh.memory


SHARED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""What every rank has an equal part of; a vocabulary may be split unevenly."""


def faults(config: _mesh.MeshConfig, dims: ParallelDims, spec: ExperimentSpec) -> Iterator[Fault]:
    """Heads, key/value heads, the MLP and with sequence parallel the sequence must divide by the degree."""
    if dims.tp == 1:
        return
    shape = spec.model.shape
    if shape is not None:
        have = {name: int(getattr(shape, name)) for name in SHARED}
        wrong = [f"{name} {count}" for name, count in have.items() if count % dims.tp]
        if wrong:
            yield _refused(
                f"does not divide the model's {' and '.join(wrong)}", math.gcd(*have.values()), dims
            )
    parts, seq_len = dims.tp * dims.cp, spec.data.seq_len
    if config.sequence_parallel and seq_len % parts and not seq_len % dims.cp:
        product = "tp" if dims.cp == 1 else f"tp × cp = {parts}"
        yield _refused(f"{product} does not divide data.seq_len {seq_len}", seq_len // dims.cp, dims)


def sent(config: _mesh.MeshConfig, sizes: Sizes) -> Iterator[Sent]:
    """Attention's and MLP's inputs and results, in every pass; nothing can be computed meanwhile.

    With sequence parallel an all-gather before and a reduce-scatter behind, and their opposites on the way back;
    without it an all-reduce behind, and on the way back one before (Korthikanti et al., 2023, figures 4 and 5).
    """
    if sizes.dims.tp == 1:
        return
    size = float(sizes.tokens * sizes.width * sizes.compute)
    ends = 1 / sizes.blocks if sizes.blocks else 0.0  # the embedding's result, and the head's input
    calls = sizes.micro_batches * (sizes.blocks + ends) * 2 * 2
    # What is computed again stops at the last tensor that is needed: before the MLP's result is added up.
    again = sizes.micro_batches * sizes.blocks * (sizes.passes - 1)
    kinds: list[tuple[str, Collective, float]] = [("all-reduce of activations", "all_reduce", calls + again)]
    if config.sequence_parallel:
        kinds = [
            ("all-gather of activations", "all_gather", calls + 2 * again),
            ("reduce-scatter of activations", "reduce_scatter", calls + again),
        ]
    for what, kind, times in kinds:
        yield Sent(what=what, dimension="tp", kind=kind, ranks=sizes.dims.tp, calls=times, size=size)
    if not config.loss_parallel:
        yield Sent(
            what="all-gather of the head",
            dimension="tp",
            kind="all_gather",
            ranks=sizes.dims.tp,
            calls=sizes.micro_batches,
            size=sizes.end_weights * sizes.dims.tp * sizes.compute,
        )


def _refused(problem: str, common: int, dims: ParallelDims) -> Fault:
    """A degree that isn't among the divisors of `common`; those that also fit this many processes are offered."""
    divisors = [d for d in range(1, common + 1) if common % d == 0]
    room = dims.tp * dims.dp_replicate  # ranks that aren't copies' can be tensor parallel, and the other way
    near = min((d for d in divisors if room % d == 0), key=lambda d: (abs(d - dims.tp), -d))
    return Fault(
        key="parallel.tp",
        value=str(dims.tp),
        problem=problem,
        allowed=f"divisors of {common}: {', '.join(map(str, divisors[:12]))}",
        nearest=str(near),
        fix=f"parallel.tp={near}",
    )
