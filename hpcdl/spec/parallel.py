"""The parallel degrees that every strategy has; a strategy's own keys stand in its own file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The mesh's dimensions, outermost first: neighbours in rank share the innermost, which talks most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSpec:
    """Degrees of each dimension of the device mesh; their product is the world size, one may be -1.

    Base class: `hpcdl.parallel.<name>.Config` is what a config becomes.
    """

    name: str
    """The strategy: the name of a file in hpcdl/parallel/."""
    dp_replicate: Annotated[int, Ge(-1)] = -1
    """Copies of the model; -1: whatever the other degrees leave."""
    dp_shard: Annotated[int, Ge(-1)] = 1
    """Ranks over which parameters are sharded."""
    cp: Annotated[int, Ge(-1)] = 1
    """Context parallel: ranks that share a sequence."""
    tp: Annotated[int, Ge(-1)] = 1
    """Tensor parallel: ranks that share a matrix."""
    pp: Annotated[int, Ge(-1)] = 1
    """Pipeline parallel: stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelDims:
    """The degrees of a world of known size: all at least 1, their product is the number of ranks."""

    pp: int
    """Pipeline stages' ranks."""
    dp_replicate: int
    """Copies of the model."""
    dp_shard: int
    """Ranks over which a copy's parameters are sharded."""
    cp: int
    """Ranks that share a sequence."""
    tp: int
    """Ranks that share a matrix."""

    @classmethod
    def fill(cls, spec: ParallelSpec, world_size: int) -> ParallelDims:
        """The degrees of `spec`, the one that is -1 filled with what the others leave of `world_size` ranks.

        Raises:
            ValueError: the product is not the world size.
        """
        degrees = {name: int(getattr(spec, name)) for name in DIMENSIONS}
        unfilled = [name for name, degree in degrees.items() if degree == -1]
        fixed = math.prod(degree for degree in degrees.values() if degree != -1)
        if len(unfilled) == 1 and fixed and world_size % fixed == 0:
            degrees[unfilled[0]] = world_size // fixed
        if len(unfilled) > 1 or math.prod(degrees.values()) != world_size:
            given = " × ".join(f"{name}={getattr(spec, name)}" for name in DIMENSIONS)
            raise ValueError(f"parallel: {given} doesn't make {world_size} processes")
        return cls(**degrees)

    @classmethod
    def possible(cls, spec: ParallelSpec, world_size: int) -> ParallelDims | None:
        """As `fill`; None where the degrees don't make the world: a rule of its own tells the user."""
        try:
            dims = cls.fill(spec, world_size)
        except ValueError:
            return None
        return dims if dims.world_size > 0 else None

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def data_ranks(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def gradient_ranks(self) -> int:
        """Ranks whose gradients of the same parameter differ, and are averaged: other data or other tokens."""
        return self.data_ranks * self.cp
