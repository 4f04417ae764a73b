"""Methods that make training or the model cheaper: one file each, found by name.

A method's file holds `Config` (a frozen dataclass below `PeftSpec`), `check(config, spec)` and
`apply(config, model)`; torch and peft are imported inside `apply` only. Quantization has a folder of its own.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, PeftSpec

if TYPE_CHECKING:
    from torch import nn


class Method(Protocol):
    """What a method's module offers."""

    Config: type[PeftSpec]

    def check(self, config: Any, spec: ExperimentSpec) -> Iterator[Fault]:
        """Faults of this method with this experiment."""
        ...

    def apply(self, config: Any, model: nn.Module) -> nn.Module:
        """The changed model."""
        ...


@cache
def names() -> tuple[str, ...]:
    """Names of all methods: the files of this folder."""
    modules = pkgutil.iter_modules(__path__)
    return tuple(sorted(m.name for m in modules if not m.ispkg and not m.name.startswith("_")))


def get(name: str) -> Method:
    """The method called `name`.

    Raises:
        KeyError: there is no such file.
    """
    if name not in names():
        raise KeyError(name)
    return cast(Method, importlib.import_module(f"{__name__}.{name}"))
