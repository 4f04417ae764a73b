"""Files of a folder, found by name: strategies, methods, schemes. Adding one is adding a file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from functools import cached_property
from typing import Generic, TypeVar, cast

M = TypeVar("M")


class Folder(Generic[M]):
    """The modules of a package, less subpackages and those whose names begin with an underscore."""

    def __init__(self, package: str, path: Iterable[str]) -> None:
        """Imports nothing yet.

        Args:
            package: its `__name__`.
            path: its `__path__`.
        """
        self._package = package
        self._path = path

    @cached_property
    def _names(self) -> tuple[str, ...]:
        modules = pkgutil.iter_modules(self._path)
        return tuple(sorted(m.name for m in modules if not m.ispkg and not m.name.startswith("_")))

    def names(self) -> tuple[str, ...]:
        """Names of all modules, in order."""
        return self._names

    def get(self, name: str) -> M:
        """The module called `name`.

        Raises:
            KeyError: there is no such file.
        """
        if name not in self._names:
            raise KeyError(name)
        return cast(M, importlib.import_module(f"{self._package}.{name}"))
