"""Hybrid sharded data parallel: sharded inside a node, copied between nodes.

Only gradients of a shard's size travel between nodes; parameters are gathered over the quick links inside.

Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", VLDB 2023, 3.2.2.
"""

from __future__ import annotations

from collections.abc import Iterator

from hpcdl.parallel import _mesh
from hpcdl.spec.traffic import Sent, Sizes

Config = _mesh.MeshConfig
check = _mesh.check
traffic = _mesh.traffic
build = _mesh.build
memory = _mesh.memory


def sent(config: _mesh.MeshConfig, sizes: Sizes) -> Iterator[Sent]:
    """The copies' shards of the gradients, once a step."""
    dims = sizes.dims
    if dims.dp_replicate == 1 or not _mesh.shards(config, dims):
        return
    shard = dims.dp_shard * dims.cp
    yield Sent(
        what="all-reduce of the shards' gradients",
        dimension="dp_replicate",
        kind="all_reduce",
        ranks=dims.dp_replicate,
        stride=shard * dims.tp,
        calls=sizes.blocks + 1,
        size=4 * sizes.trained / shard / (sizes.blocks + 1),
        behind="last backward",
    )
