"""Types and values in words: what a field allows, how a value is typed, what is wrong with it."""

from __future__ import annotations

import dataclasses
import re
import shlex
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from annotated_types import Ge, Gt, Interval, Le, Lt

from hpcdl.errors import Fault, nearest_name

PROBLEMS = {
    "missing": "is missing",
    "literal_error": "is not one of the choices",
    "int_type": "is not a whole number",
    "int_from_float": "is not a whole number",
    "int_parsing": "is not a whole number",
    "int_parsing_size": "is too large",
    "float_type": "is not a number",
    "float_parsing": "is not a number",
    "finite_number": "is not a finite number",
    "bool_type": "is neither true nor false",
    "bool_parsing": "is neither true nor false",
    "string_type": "is not text",
    "string_unicode": "is not readable text",
    "json_invalid": "is not readable text",
    "greater_than": "is too small",
    "greater_than_equal": "is too small",
    "less_than": "is too large",
    "less_than_equal": "is too large",
    "list_type": "is not a list",
    "tuple_type": "is not a list",
    "dict_type": "is not a group of keys",
    "dataclass_type": "is not a group of keys",
    "too_long": "has too many items",
    "too_short": "has too few items",
}
"""What is wrong, by pydantic's error type. Only these can occur with the types of hpcdl/spec (tested)."""


@cache
def hints(cls: type) -> dict[str, Any]:
    """Type of each field of a dataclass, with its bounds."""
    return typing.get_type_hints(cls, include_extras=True)


def parts_of(hint: Any) -> tuple[list[Any], bool]:
    """The members of a union without None, and whether None was one."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [m for m in typing.get_args(hint) if m is not types.NoneType]
        return members, len(members) < len(typing.get_args(hint))
    return [hint], False


def inner(hint: Any, part: Any) -> Any:
    """Type of the item `part` (a key or an index) of a value of type `hint`; None where there is none."""
    for member in parts_of(hint)[0]:
        origin, args = typing.get_origin(member), typing.get_args(member)
        if dataclasses.is_dataclass(member) and isinstance(member, type):
            return hints(member).get(str(part))
        if origin is dict:
            return args[1]
        if origin is tuple and isinstance(part, int):
            return args[0] if len(args) == 2 and args[1] is Ellipsis else args[min(part, len(args) - 1)]
    return None


def allowed(hint: Any) -> str:
    """What a field of this type takes, in words."""
    members, optional = parts_of(hint)
    return " or ".join(dict.fromkeys(_one(member) for member in members)) + (", or null" if optional else "")


def _one(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return f"{_one(args[0])} {_bounds(args[1:])}".rstrip()
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a list of {_one(args[0])}, like [a,b]"
        return f"a list of {len(args)}: " + ", ".join(_one(item) for item in args)
    if origin is dict:
        return "keys with values, like {key: value}"
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return "a group of keys: " + ", ".join(hints(hint))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


def _bounds(metadata: tuple[Any, ...]) -> str:
    words = []
    for bound in metadata:
        for item in bound if isinstance(bound, Interval) else (bound,):
            match item:
                case Ge():
                    words.append(f"of at least {item.ge}")
                case Gt():
                    words.append(f"above {item.gt}")
                case Le():
                    words.append(f"of at most {item.le}")
                case Lt():
                    words.append(f"below {item.lt}")
    return " and ".join(words)


def typed(value: Any, limit: int = 80) -> str:
    """A value as it is typed on the command line, cut where it is long."""
    text = _typed(value).replace("\n", "\\n")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _typed(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_typed(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_typed(item)}" for key, item in value.items()) + "}"
    return '""' if value == "" else str(value)


def bad_value(key: str, value: Any, kind: str, hint: Any, default: Any) -> Fault:
    """The fault of one value.

    Args:
        key: dotted key.
        value: what was given.
        kind: pydantic's error type.
        hint: the field's type.
        default: the field's default; `dataclasses.MISSING` where it has none.
    """
    nearest = ""
    if kind == "literal_error":
        choices = [str(c) for m in parts_of(hint)[0] for c in typing.get_args(m)]
        nearest = nearest_name(str(value), choices) or next((c for c in choices if str(value) in c), "")
    return Fault(
        key=key,
        value=typed(value),
        problem="is null, and must be given" if value is None else PROBLEMS[kind],
        allowed=allowed(hint),
        nearest=nearest,
        fix=shell(f"{key}={nearest or _example(value, hint, default)}"),
    )


def missing(key: str, hint: Any) -> Fault:
    """The fault of a key that has no default and was not given."""
    example = _example(None, hint, dataclasses.MISSING)
    return Fault(
        key=key, value="", problem="is missing", allowed=allowed(hint), fix=shell(f"+{key}={example}")
    )


def shell(override: str) -> str:
    """An override as it is typed in a shell: with quotes where the shell would take it apart."""
    return override if re.fullmatch(r"[\w+~.=,:/@%-]+", override) else shlex.quote(override)


def _example(value: Any, hint: Any, default: Any) -> str:
    """A value that would do: what was probably meant, else the default, else the least that fits."""
    member = parts_of(hint)[0][0]
    kind, *bounds = typing.get_args(member) if typing.get_origin(member) is typing.Annotated else [member]
    meant = _meant(value, kind)
    if meant is not None and _within(meant, bounds):
        return typed(meant)
    if default is not dataclasses.MISSING:
        return typed(default)
    if typing.get_origin(kind) is Literal:
        return str(typing.get_args(kind)[0])
    for number in (1, 0.5, 0, 8):
        if kind in (int, float) and _within(number, bounds):
            return typed(number)
    return {bool: "true", str: "TEXT"}.get(kind, "…")


def _within(number: Any, bounds: list[Any]) -> bool:
    return all(
        (not isinstance(b, Ge) or number >= b.ge)
        and (not isinstance(b, Gt) or number > b.gt)
        and (not isinstance(b, Le) or number <= b.le)
        and (not isinstance(b, Lt) or number < b.lt)
        for bound in bounds
        for b in (bound if isinstance(bound, Interval) else (bound,))
    )


def _meant(value: Any, kind: Any) -> Any:
    """The value that somebody who wrote `value` probably had in mind; None where there is no telling."""
    if typing.get_origin(kind) is tuple and isinstance(value, str):
        return [value]
    if kind is bool:
        spoken = {"yes": True, "on": True, "true": True, "1": True, "no": False, "off": False, "false": False}
        return spoken.get(str(value).lower())
    if kind is str and isinstance(value, bool | int | float):
        return f'"{typed(value)}"'
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            return None
        if abs(number) < 1e15:
            return round(number) if kind is int else number
    return None


def unknown_key(key: str, value: Any, siblings: typing.Iterable[str], elsewhere: Mapping[str, str]) -> Fault:
    """The fault of a key that does not exist.

    Args:
        key: dotted key as given.
        value: what it was set to.
        siblings: names that exist in the same place.
        elsewhere: dotted key of each name that exists somewhere.
    """
    parent, _, name = key.rpartition(".")
    prefix = parent + "." if parent else ""
    names = sorted(siblings)
    nearest = elsewhere.get(name, "")
    close = nearest_name(name, names)
    if close and (not nearest or nearest == key):
        nearest = prefix + close
    short = typed(value, 40)
    return Fault(
        key=key,
        value=short,
        problem="there is no such key",
        allowed=", ".join(names),
        nearest=nearest,
        fix=shell(f"{nearest}={short}") if nearest else f"leave {key} out",
    )
