"""The parallel degrees that every strategy has; a strategy's own keys stand in its own file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSpec:
    """Degrees of each dimension of the device mesh; their product is the world size.

    Base class: `hpcdl.parallel.<name>.Config` is what a config becomes.
    """

    name: str
    """The strategy: the name of a file in hpcdl/parallel/."""
    dp_replicate: Annotated[int, Ge(-1)] = -1
    """Copies of the model; -1: whatever the other degrees leave."""
    dp_shard: Annotated[int, Ge(-1)] = 1
    """Ranks over which parameters are sharded."""
    cp: Annotated[int, Ge(1)] = 1
    """Context parallel: ranks that share a sequence."""
    tp: Annotated[int, Ge(1)] = 1
    """Tensor parallel: ranks that share a matrix."""
    pp: Annotated[int, Ge(1)] = 1
    """Pipeline parallel: stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftSpec:
    """Base of the fine-tuning methods; `hpcdl.compress.<name>.Config` is what a config becomes."""

    name: str
    """The method: `none`, or the name of a file in hpcdl/compress/."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """How weights are held. Only unquantized here; each scheme will be a file in hpcdl/compress/."""

    scheme: str = "none"
    """`none`: weights stay in the training precision."""
