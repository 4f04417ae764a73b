"""Formats of exported models: one file each, found by name.

A format's file holds what `Format` says. Nothing heavy is imported at module level: commands list formats and
their kinds of numbers on login nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hpcdl.byname import Folder
from hpcdl.errors import HpcdlError, UsageError, nearest_name
from hpcdl.export import Bound
from hpcdl.export.source import Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Format(Protocol):
    """What a format's module offers."""

    SUMMARY: str
    """For `--help`."""
    FILE: str
    """Name of the file that a runtime opens."""
    RUNTIME: str
    """A file of hpcdl/export/runtimes: what its exports are proved in."""
    NEEDS: tuple[str, ...]
    """Packages that it is written with."""
    QUANTS: Mapping[str, Bound]
    """Kinds of numbers, the usual one first, and how far each may be from the source."""

    def write(
        self, source: Source, quant: str, folder: Path, options: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Writes the export into `folder`; returns what its card is to tell besides.

        Raises:
            HpcdlError: this model can't be written so.
        """
        ...

    def weights(self, source: Source, folder: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """What the written file holds, as the source names, shapes and orders it, made whole again."""
        ...


_folder: Folder[Format] = Folder(__name__, __path__)
names, get = _folder.names, _folder.get


def chosen(name: str, quant: str | None) -> tuple[Format, str]:
    """The format and the kind of numbers that a user asked for.

    Raises:
        UsageError: there is no such one.
    """
    if name not in names():
        raise UsageError(_unknown("--to", name, names()))
    found = get(name)
    kinds = tuple(found.QUANTS)
    if quant is not None and quant not in kinds:
        raise UsageError(_unknown("--quant", quant, kinds) + f" for --to {name}")
    return found, quant or kinds[0]


def refuse_missing(packages: tuple[str, ...], what: str) -> None:
    """Tells which packages are missing.

    Raises:
        HpcdlError: one can't be imported here.
    """
    import importlib.util

    missing = [each for each in packages if importlib.util.find_spec(each) is None]
    if missing:
        raise HpcdlError(f"{what} needs {', '.join(missing)}: pip install 'hpcdl[export,gguf,executorch]'")


def _unknown(option: str, given: str, allowed: tuple[str, ...]) -> str:
    near = nearest_name(given, allowed)
    hint = f"; nearest: {near}" if near else ""
    return f"{option} {given}: there is no such one{hint}\nallowed: {', '.join(allowed)}"
