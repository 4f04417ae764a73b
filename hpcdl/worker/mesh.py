"""The device mesh: one dimension a way of sharing the work, in torchtitan's order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hpcdl.errors import HpcdlError
from hpcdl.spec import ParallelSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Outermost first: neighbours in rank share the innermost, which talks most."""


def degrees(spec: ParallelSpec, world_size: int) -> dict[str, int]:
    """Size of each dimension, the one that is -1 filled with what the others leave.

    Raises:
        HpcdlError: the product is not the world size.
    """
    sizes = {name: int(getattr(spec, name)) for name in DIMENSIONS}
    open_dimensions = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(open_dimensions) == 1 and world_size % fixed == 0:
        sizes[open_dimensions[0]] = world_size // fixed
    if len(open_dimensions) > 1 or math.prod(sizes.values()) != world_size:
        given = " × ".join(f"{name}={getattr(spec, name)}" for name in DIMENSIONS)
        raise HpcdlError(f"parallel: {given} doesn't make {world_size} processes")
    return sizes


def build(spec: ParallelSpec, world_size: int, device_type: str) -> DeviceMesh:
    """The mesh over all ranks; sub-meshes by name, `mesh["dp_replicate"]`."""
    from torch.distributed.device_mesh import init_device_mesh

    sizes = degrees(spec, world_size)
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def data_place(mesh: DeviceMesh) -> tuple[int, int]:
    """This rank's place among those that read different samples, and how many those are."""
    shard_rank, shards = mesh.get_local_rank("dp_shard"), mesh["dp_shard"].size()
    return mesh.get_local_rank("dp_replicate") * shards + shard_rank, mesh["dp_replicate"].size() * shards
