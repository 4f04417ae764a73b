"""Tensor parallel: each rank holds some columns or rows of every matrix, and some heads of the attention.

Source: Shoeybi et al., "Megatron-LM", 2019; with sequence parallel: Korthikanti et al., "Reducing
Activation Recomputation in Large Transformer Models", MLSys 2023, section 4.2.
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
    """Heads, key/value heads and the sequence must divide by the degree."""
    if dims.tp == 1:
        return
    shape = spec.model.shape
    if shape is not None:
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            have = int(getattr(shape, name))
            if have % dims.tp:
                yield _mesh.does_not_divide("tp", dims.tp, f"the model's {name}", have)
    if config.sequence_parallel and spec.data.seq_len % (dims.tp * dims.cp):
        yield _mesh.does_not_divide("tp", dims.tp * dims.cp, "data.seq_len", spec.data.seq_len, "tp × cp ")
