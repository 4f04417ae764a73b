"""Methods that make training or the model cheaper: one file each, found by name.

A method's file holds `Config` (a frozen dataclass below `PeftSpec`), `check(config, spec)`,
`memory(config, matrix)` and `apply(config, model)`; torch and peft are imported inside `apply` only.
Quantization has a folder of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from hpcdl.byname import Folder
from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, PeftSpec
from hpcdl.spec.layout import Beside, Matrix

if TYPE_CHECKING:
    from torch import nn


class Method(Protocol):
    """What a method's module offers."""

    Config: type[PeftSpec]

    def check(self, config: Any, spec: ExperimentSpec) -> Iterator[Fault]:
        """Faults of this method with this experiment."""
        ...

    def memory(self, config: Any, matrix: Matrix) -> Beside:
        """What it puts beside a matrix."""
        ...

    def apply(self, config: Any, model: nn.Module) -> nn.Module:
        """The changed model."""
        ...


_folder: Folder[Method] = Folder(__name__, __path__)
names, get = _folder.names, _folder.get


def freezes_base(spec: ExperimentSpec) -> bool:
    """Whether the experiment's method leaves the model's own weights as they are (a file says `FREEZES_BASE`)."""
    return bool(getattr(get(spec.peft.name), "FREEZES_BASE", False))
