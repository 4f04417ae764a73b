"""One section of a config against its dataclass of hpcdl/spec: every fault, in words of ours."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from pydantic_core import ValidationError

from hpcdl import compress, parallel, tasks
from hpcdl.compress import offload, prune, quant
from hpcdl.errors import Fault, nearest_name
from hpcdl.experiment import schema, words
from hpcdl.spec import (
    ExperimentSpec,
    LaunchOptions,
    OffloadSpec,
    ParallelSpec,
    PeftSpec,
    PruneSpec,
    QuantSpec,
    TaskSpec,
)

FOUND_BY_NAME: dict[type, Any] = {
    ParallelSpec: parallel,
    PeftSpec: compress,
    QuantSpec: quant,
    PruneSpec: prune,
    OffloadSpec: offload,
    TaskSpec: tasks,
}
"""Sections whose own keys are told by the file that their `name` names."""
NAMED_BY: dict[type, str] = {QuantSpec: "scheme"}
"""The key that does so, where it isn't `name`."""


def validate(plain: Mapping[str, Any], skip: Collection[str] = ()) -> tuple[dict[str, Any], list[Fault]]:
    """Every section and top-level key that is right, and the faults of the others."""
    right: dict[str, Any] = {}
    faults: list[Fault] = []
    known = top_level()
    for name, hint in known.items():
        if name in skip:
            continue
        value, found = _one(name, hint, plain)
        faults += found
        if not found:
            right[name] = value
    for name in plain:
        if name not in known:
            faults.append(words.unknown_key(str(name), plain[name], known, every_key()))
    return right, faults


@cache
def top_level() -> dict[str, Any]:
    """Every key at the root of a config, and its type."""
    return {**words.hints(ExperimentSpec), **words.hints(LaunchOptions)}


@cache
def every_key() -> dict[str, str]:
    """Dotted key of each leaf name; the first where several sections have it."""
    found: dict[str, str] = {}
    for name, hint in top_level().items():
        found.setdefault(name, name)
        for cls in _classes(hint):
            for key in words.hints(cls):
                found.setdefault(key, f"{name}.{key}")
    return found


def _classes(hint: Any) -> list[type]:
    if hint in FOUND_BY_NAME:
        return [FOUND_BY_NAME[hint].get(name).Config for name in FOUND_BY_NAME[hint].names()]
    return [hint] if dataclasses.is_dataclass(hint) and isinstance(hint, type) else []


def type_of(key: str) -> Any:
    """Type of the field that a dotted key names, or None where the spec has no such field."""
    first, *rest = key.split(".")
    hint = top_level().get(first)
    candidates: list[Any] = [*_classes(hint)] or [hint]
    for part in rest:
        found = (words.inner(candidate, part) for candidate in candidates)
        candidates = [hint for hint in found if hint is not None]
    return candidates[0] if candidates else None


def _one(name: str, hint: Any, plain: Mapping[str, Any]) -> tuple[Any, list[Fault]]:
    section = dataclasses.is_dataclass(hint)
    if name not in plain:
        if name in _defaults():
            return _defaults()[name], []
        fix = f"choose a file of the group: {name}=…" if section else f"{name}=…"
        return None, [Fault(key=name, value="", problem="is missing", allowed=words.allowed(hint), fix=fix)]
    value = plain[name]
    if not section:
        return _validated(name, hint, value)
    if not isinstance(value, Mapping):
        return None, [_not_a_section(name, hint, value)]
    if hint in FOUND_BY_NAME:
        hint, fault = _found_by_name(name, hint, value)
        if fault is not None:
            return None, [fault]
    return _validated(name, hint, value)


@cache
def _defaults() -> dict[str, Any]:
    fields = (*dataclasses.fields(ExperimentSpec), *dataclasses.fields(LaunchOptions))
    return {f.name: default_of(f) for f in fields if default_of(f) is not dataclasses.MISSING}


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default; `dataclasses.MISSING` where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _not_a_section(name: str, hint: Any, value: Any) -> Fault:
    return Fault(
        key=name,
        value=words.typed(value),
        problem="is a group of keys, not one value",
        allowed=", ".join(words.hints(hint)),
        fix=f"choose a file of the group with {name}=OPTION, or set one key with {name}.KEY=VALUE",
    )


def _found_by_name(section: str, base: type, value: Mapping[str, Any]) -> tuple[type, Fault | None]:
    folder, key = FOUND_BY_NAME[base], NAMED_BY.get(base, "name")
    name, names = value.get(key), folder.names()
    if isinstance(name, str) and name in names:
        return folder.get(name).Config, None
    near = nearest_name(str(name), names)
    return base, Fault(
        key=f"{section}.{key}",
        value=words.typed(name) if key in value else "",
        problem=f"there is no such {NAMED_BY.get(base, 'method')}" if name else "is missing",
        allowed="one of " + ", ".join(names),
        nearest=near,
        fix=f"{section}={near or names[0]}",
    )


_seen: dict[tuple[str, Any, str], Any] = {}
"""Sections that were right: the points of a sweep share all but a few of them."""


_same: dict[int, tuple[Any, Any, Any]] = {}
"""The same by identity, for sections that the points of a sweep share outright."""


def _validated(name: str, hint: Any, value: Any) -> tuple[Any, list[Fault]]:
    given = value
    if isinstance(value, dict) and id(value) in _same and _same[id(value)][:2] == (value, hint):
        return _same[id(value)][2], []
    value = _numbers_as_text(hint, value)
    try:
        text = json.dumps(value, default=str)
    except (TypeError, ValueError):
        return None, [Fault(key=name, value=words.typed(value), problem="can't be written as plain data")]
    key = (name, hint, text)
    if key in _seen:
        _same[id(given)] = (given, hint, _seen[key])
        return _seen[key], []
    try:
        # JSON, because the strict mode takes lists for tuples and dicts for dataclasses only there.
        right = schema.validator(hint).validate_json(text)
    except ValidationError as error:
        return None, _faults(name, hint, value, error)
    _seen[key] = right
    return right, []


def _numbers_as_text(hint: Any, value: Any) -> Any:
    """The value with whole numbers made text where the field is text: an account called 1234."""
    members = words.parts_of(hint)[0]
    if isinstance(value, Mapping):
        return {str(k): _numbers_as_text(words.inner(hint, str(k)), v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers_as_text(words.inner(hint, i), v) for i, v in enumerate(value)]
    if members == [str] and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value


def _faults(name: str, hint: Any, value: Any, error: ValidationError) -> list[Fault]:
    found: dict[str, Fault] = {}
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        fault = _fault(name, hint, value, item["type"], item["loc"])
        found.setdefault(fault.key, fault)
    return list(found.values())


def _fault(name: str, hint: Any, value: Any, kind: str, loc: tuple[int | str, ...]) -> Fault:
    """Walks down to where pydantic found something; a union's member at the end of `loc` is left out."""
    key, default, siblings = name, dataclasses.MISSING, hint
    for part in loc:
        if not isinstance(value, Mapping | list) or (kind != "missing" and not _has(value, part)):
            break
        siblings, below = hint, words.inner(hint, part)
        default = _default_in(hint, part)
        key = f"{key}.{part}"
        if not _has(value, part):
            return words.missing(key, below)
        value, hint = value[part], below  # type: ignore[index]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        cls = next(m for m in words.parts_of(siblings)[0] if dataclasses.is_dataclass(m))
        others = _methods_with(name, loc) if len(loc) == 1 else []
        if others:
            return _of_another(name, str(loc[0]), value, words.hints(cls), others)  # type: ignore[arg-type]
        return words.unknown_key(key, value, words.hints(cls), every_key())  # type: ignore[arg-type]
    return words.bad_value(key, value, kind, hint, default)


def _methods_with(section: str, loc: tuple[int | str, ...]) -> list[str]:
    """Methods of a section that have the key."""
    folder = FOUND_BY_NAME.get(top_level()[section])
    if folder is None:
        return []
    found = [name for name in folder.names() if str(loc[0]) in words.hints(folder.get(name).Config)]
    # What others are made from goes first: LoRA before DoRA.
    return sorted(found, key=lambda name: len(folder.get(name).Config.__mro__))


def _of_another(section: str, key: str, value: Any, known: Mapping[str, Any], others: list[str]) -> Fault:
    """A key that exists, but for another method than the chosen one."""
    have = f"{', '.join(others)} {'has' if len(others) == 1 else 'have'} it"
    return Fault(
        key=f"{section}.{key}",
        value=words.typed(value),
        problem=f"there is no such key for the chosen {section}; {have}",
        allowed=", ".join(known),
        nearest=f"{section}={others[0]}",
        fix=words.shell(f"{section}={others[0]}")
        + " "
        + words.shell(f"{section}.{key}={words.typed(value)}"),
    )


def _has(value: Any, part: int | str) -> bool:
    if isinstance(value, Mapping):
        return part in value
    return isinstance(part, int) and part < len(value)


def _default_in(hint: Any, part: Any) -> Any:
    for member in words.parts_of(hint)[0]:
        if dataclasses.is_dataclass(member):
            for field in dataclasses.fields(member):
                if field.name == part:
                    return default_of(field)
    return dataclasses.MISSING
