"""A composed config without its interpolations: ${…} replaced by what it stands for, or told as a fault."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationToMissingValueError,
    OmegaConfBaseException,
)

from hpcdl.errors import Fault, nearest_name
from hpcdl.experiment import sections, words
from hpcdl.launch.hydra_faults import in_one_line


def resolved(config: DictConfig) -> tuple[dict[str, Any], list[Fault]]:
    """The config as plain data without interpolations, and what could not be resolved or is missing."""
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError, RecursionError):
        faults = list(_unresolved(config, ""))
        with_holes = _without(config, {fault.key for fault in faults}, "")
        return dict(with_holes), faults
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}, []


def _unresolved(node: Container, prefix: str) -> Iterator[Fault]:
    keys: Any = list(node.keys()) if isinstance(node, DictConfig) else range(len(node))  # type: ignore[arg-type]
    for key in keys:
        full = f"{prefix}{key}"
        child = node._get_node(key)
        written = child._value() if child is not None else None  # type: ignore[union-attr]
        if OmegaConf.is_missing(node, key):
            yield Fault(
                key=full,
                value="???",
                problem="must be given: the file leaves it open with ???",
                allowed=words.allowed(hint) if (hint := sections.type_of(full)) else "",
                fix=f"{full}=VALUE",
            )
        elif isinstance(child, Container) and not OmegaConf.is_interpolation(node, key):
            if not child._is_none():
                yield from _unresolved(child, f"{full}.")
        else:
            try:
                OmegaConf.to_container(OmegaConf.create({"x": node[key]}), resolve=True)
            except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
                yield _bad_interpolation(full, str(written), error)


def _bad_interpolation(key: str, written: str, error: Exception) -> Fault:
    names = re.findall(r"\$\{\s*([\w.]+)\s*\}", written)
    near = ""
    if isinstance(error, InterpolationToMissingValueError):
        problem = "points to a key that is missing"
    elif isinstance(error, InterpolationKeyError):
        problem = "points to a key that is not there"
        leaf = names[0].rpartition(".")[2] if names else ""
        known = sections.every_key()
        near = known.get(leaf) or nearest_name(names[0] if names else "", known.values())
    elif isinstance(error, RecursionError) or "Recursive" in str(error):
        problem = "points to itself"
    else:
        told = in_one_line(str(error))
        told = re.sub(r"^\w*Error raised while resolving interpolation: ", "", told)
        problem = f"can't be resolved: {told}"
    return Fault(
        key=key,
        value=written,
        problem=problem,
        allowed="${KEY} with a dotted key of this config, or ${oc.env:VARIABLE,DEFAULT}",
        nearest="${" + near + "}" if near else "",
        fix=words.shell(f"{key}=" + ("${" + near + "}" if near else "VALUE")),
    )


def _without(node: Container, broken: set[str], prefix: str) -> Any:
    """Plain data less the keys that could not be resolved."""
    if isinstance(node, ListConfig):
        kept = [i for i in range(len(node)) if f"{prefix}{i}" not in broken]
        return [_value(node, i, broken, prefix) for i in kept]
    assert isinstance(node, DictConfig)
    return {str(k): _value(node, k, broken, prefix) for k in node if f"{prefix}{k!s}" not in broken}


def _value(node: Container, key: Any, broken: set[str], prefix: str) -> Any:
    value = node[key]
    if not isinstance(value, Container):
        return value
    return _without(value, broken, f"{prefix}{key}.")
