"""Which weights of a model are taken out: one file a method, found by name.

A method's file holds `Config` (a frozen dataclass below `PruneSpec`), `check(config, spec)` and
`apply(config, model, calibration)`, which comes before quantization and the fine-tuning method; torch is
imported inside `apply` only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from hpcdl.byname import Folder
from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, PruneSpec

if TYPE_CHECKING:
    from torch import nn


class Pruner(Protocol):
    """What a method's module offers."""

    Config: type[PruneSpec]

    def check(self, config: Any, spec: ExperimentSpec) -> Iterator[Fault]:
        """Faults of this method with this experiment."""
        ...

    def apply(self, config: Any, model: nn.Module) -> nn.Module:
        """The model with zeros in it."""
        ...


_folder: Folder[Pruner] = Folder(__name__, __path__)
names, get = _folder.names, _folder.get
