"""Hybrid sharded data parallel: sharded inside a node, copied between nodes.

Only gradients of a shard's size travel between nodes; parameters are gathered over the quick links inside.

Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", VLDB 2023, 3.2.2.
"""

from __future__ import annotations

from hpcdl.parallel import _mesh

Config = _mesh.MeshConfig
check = _mesh.check
build = _mesh.build
