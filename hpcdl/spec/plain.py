"""ExperimentSpec ↔ plain dicts and spec.yaml. Standard library and yaml only: compute nodes start quickly.

Nothing is validated here: what is read was validated before it was written (hpcdl.experiment).
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Hashable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

T = TypeVar("T")

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as dicts and lists that YAML and JSON know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    return value


@cache
def field_types(cls: Hashable) -> dict[str, Any]:
    """Resolved type of each field of a dataclass, without its Annotated bounds."""
    return typing.get_type_hints(cast(type, cls))


def from_plain(cls: type[T], plain: Mapping[str, Any], overrides: Mapping[str, type] | None = None) -> T:
    """Builds the dataclass `cls` from a plain dict; `overrides` names a field's concrete class."""
    hints = {**field_types(cast(Hashable, cls)), **(overrides or {})}
    return cls(**{key: _build(hints[key], value) for key, value in plain.items()})


def _build(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not types.NoneType)
        return _build(hint, value)
    if origin is tuple:
        return tuple(value)
    if origin is dict:
        item = typing.get_args(hint)[1]
        return {k: _build(item, v) for k, v in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value)
    return value


def dump_yaml(plain: Any) -> str:
    """Plain data as YAML text, in the order given."""
    return str(yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


def load_yaml(path: Path) -> Any:
    """Plain data from a YAML file."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)


def load_alike(path: Path, known: dict[str, dict[str, Any]]) -> Any:
    """As `load_yaml`, for many files that are alike: what another one had word for word is not parsed again.

    A thousand points of a sweep differ in a section or two, and a spec.yaml takes 3 ms.

    Args:
        path: the file.
        known: top-level sections of the files before, by their text; those of this one are added. What is returned
            shares them: it must not be changed.
    """
    text = path.read_text(encoding="utf-8")
    whole: dict[str, Any] = {}
    for section in _SECTION.split(text):
        if section not in known:
            try:
                plain = yaml.load(section, Loader=_Loader)
            except yaml.YAMLError:
                plain = section
            if plain is not None and not isinstance(plain, dict):  # sections that don't stand for themselves
                return yaml.load(text, Loader=_Loader)
            known[section] = plain or {}
        whole.update(known[section])
    return whole or yaml.load(text, Loader=_Loader)


_SECTION = re.compile(r"^(?=[A-Za-z_])", re.MULTILINE)
"""Where a top-level key begins: whatever belongs to the one before is indented."""
