"""Context parallel: ranks share a sequence, each holds some of its tokens; attention sees them all.

`allgather`: keys and values of the whole sequence are gathered by every rank, as Llama 3 was trained
(Dubey et al., "The Llama 3 Herd of Models", 2024, section 3.3.2). `ulysses`: all-to-all swaps sequence for
heads around the attention (Jacobs et al., "DeepSpeed Ulysses", 2023).
"""

from __future__ import annotations

from collections.abc import Iterator

from hpcdl.errors import Fault
from hpcdl.parallel import _mesh
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.parallel import ParallelDims

Config = _mesh.MeshConfig
check = _mesh.check
build = _mesh.build


def faults(config: _mesh.MeshConfig, dims: ParallelDims, spec: ExperimentSpec) -> Iterator[Fault]:
    """The sequence, and with Ulysses the heads, must divide by the degree."""
    if dims.cp == 1:
        return
    if spec.data.seq_len % dims.cp:
        yield _mesh.does_not_divide("cp", dims.cp, "data.seq_len", spec.data.seq_len)
    shape = spec.model.shape
    if config.cp_method == "ulysses" and shape is not None:
        heads = shape.num_attention_heads // dims.tp
        if heads % dims.cp:
            yield _mesh.does_not_divide("cp", dims.cp, "the attention heads of a rank", heads)
