"""The device mesh: one dimension a way of sharing the work, in torchtitan's order."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from hpcdl.spec.parallel import ParallelDims

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class Grid:
    """The degrees, the mesh over all ranks, and this rank's place in it."""

    def __init__(self, dims: ParallelDims, device: torch.device) -> None:
        """Makes the mesh `pp, dp_replicate, dp_shard, cp, tp`; dimensions of size 1 are in it too."""
        from torch.distributed.device_mesh import init_device_mesh

        self.dims = dims
        self.device = device
        sizes = asdict(dims)
        self.mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    @cached_property
    def weights(self) -> DeviceMesh:
        """The mesh that parameters lie on: `pp, dp_replicate, fsdp, tp`, with the same ranks in the same order.

        `fsdp` is `dp_shard` × `cp`: for a parameter, ranks with other tokens of a sequence are like ranks
        with other sequences.
        """
        from torch.distributed.device_mesh import init_device_mesh

        dims = self.dims
        sizes = {
            "pp": dims.pp,
            "dp_replicate": dims.dp_replicate,
            "fsdp": dims.dp_shard * dims.cp,
            "tp": dims.tp,
        }
        return init_device_mesh(self.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    @cached_property
    def gradient_group(self) -> ProcessGroup:
        """The ranks whose gradients of one parameter are averaged: all that have other tokens."""
        if self.dims.gradient_ranks == self.dims.dp_replicate:
            return self.group("dp_replicate")
        flat: DeviceMesh = self.weights["dp_replicate", "fsdp"]._flatten("gradients")
        return flat.get_group()

    @property
    def data_place(self) -> tuple[int, int]:
        """This rank's place among those that read different sequences, and how many those are."""
        rank = self.rank("dp_replicate") * self.dims.dp_shard + self.rank("dp_shard")
        return rank, self.dims.data_ranks

    def rank(self, dimension: str) -> int:
        """This rank's place along one dimension."""
        return self.mesh.get_local_rank(dimension)

    def group(self, dimension: str) -> ProcessGroup:
        """The ranks that differ from this one along one dimension only."""
        return self.mesh[dimension].get_group()
