"""The spec's dataclasses as schemas of pydantic-core, the validator inside pydantic.

pydantic itself would make the same schemas, and take 0.1 s to be imported and to do so: a quarter of a dry run.
The types that hpcdl/spec uses are few; each is a line below.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from functools import cache
from typing import Any

from annotated_types import Ge, Gt, Interval, Le, Lt
from pydantic_core import SchemaValidator

from hpcdl.experiment import words

CONFIG: Any = {"strict": True, "allow_inf_nan": False}
"""`max_steps=true` is no number, and no number is infinite."""


@cache
def validator(hint: Any) -> SchemaValidator:
    """Validates JSON against a type of the spec: strict types, finite numbers, no unknown keys."""
    return SchemaValidator(_schema(hint), CONFIG)


def _schema(hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return {**_schema(args[0]), **_bounds(args[1:])}
    if origin is typing.Literal:
        return {"type": "literal", "expected": list(args)}
    if origin in (typing.Union, types.UnionType):
        return _union(*words.parts_of(hint))
    if origin is tuple:
        variadic = len(args) == 2 and args[1] is Ellipsis
        items = [_schema(item) for item in (args[:1] if variadic else args)]
        return {"type": "tuple", "items_schema": items, **({"variadic_item_index": 0} if variadic else {})}
    if origin is dict:
        return {"type": "dict", "keys_schema": _schema(args[0]), "values_schema": _schema(args[1])}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint)
    return {"type": {int: "int", float: "float", bool: "bool", str: "str"}[hint]}


def _union(members: list[Any], optional: bool) -> Any:
    schemas = [_schema(member) for member in members]
    schema = schemas[0] if len(schemas) == 1 else {"type": "union", "choices": schemas}
    return {"type": "nullable", "schema": schema} if optional else schema


def _bounds(metadata: tuple[Any, ...]) -> dict[str, Any]:
    """Ge(1) → {"ge": 1}; an Interval is several at once."""
    single = [item for bound in metadata for item in (bound if isinstance(bound, Interval) else (bound,))]
    names = {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt"}
    return {names[type(item)]: getattr(item, names[type(item)]) for item in single}


def _dataclass(cls: type) -> Any:
    hints = words.hints(cls)
    fields = [
        {
            "type": "dataclass-field",
            "name": field.name,
            "schema": _with_default(field, _schema(hints[field.name])),
            "kw_only": True,
        }
        for field in dataclasses.fields(cls)
    ]
    return {
        "type": "dataclass",
        "cls": cls,
        "schema": {
            "type": "dataclass-args",
            "dataclass_name": cls.__name__,
            "fields": fields,
            "extra_behavior": "forbid",
        },
        "fields": list(hints),
        "slots": True,
        "frozen": True,
        "config": CONFIG,  # a dataclass doesn't take over the validator's
    }


def _with_default(field: dataclasses.Field[Any], schema: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return {"type": "default", "schema": schema, "default": field.default}
    if field.default_factory is not dataclasses.MISSING:
        return {"type": "default", "schema": schema, "default_factory": field.default_factory}
    return schema
