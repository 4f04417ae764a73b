"""A secret that stands in a config is refused: it would stand in spec.yaml, job.sh, trackers and sweeps for good."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from hpcdl import secrets
from hpcdl.errors import Fault

ALLOWED = f"secrets in the environment that launches, or in {secrets.FILE} (NAME=VALUE lines, chmod 600)"
_REFERENCE = re.compile(
    r"cluster\.kubernetes\.(?:secrets\.\w+=[a-z0-9][-a-z0-9.]*/[-._a-zA-Z0-9]+|tolerations\.\d+\.key=.*)"
)
"""A secret of a Kubernetes cluster that is only named, and a taint's key, which is none."""
_LEAST_KNOWN = 16
"""A shorter value of the environment may stand in a config by chance."""


def faults(plain: Mapping[str, Any]) -> list[Fault]:
    """A fault for each value of a composed config that holds a secret; none of them shows it."""
    return [
        fault
        for name, value in plain.items()
        for fault in (_seen(str(name), value) if isinstance(value, dict) else _in(str(name), value))
    ]


_same: dict[int, tuple[dict[str, Any], dict[str, Any], tuple[Fault, ...]]] = {}
"""By identity: the points of a sweep share their sections."""


def _seen(name: str, section: dict[str, Any]) -> tuple[Fault, ...]:
    known = _same.get(id(section))
    if known is None or known[0] is not section or known[1] != section:
        known = _same[id(section)] = (section, dict(section), tuple(_in(name, section)))
    return known[2]


def _in(key: str, value: Any) -> Iterator[Fault]:
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield from _in(f"{key}.{name}", below)
    elif isinstance(value, list | tuple):
        for index, below in enumerate(value):
            yield from _in(f"{key}.{index}", below)
    elif (isinstance(value, str) and value) or (isinstance(value, int) and not isinstance(value, bool)):
        name = "" if _REFERENCE.fullmatch(f"{key}={value}") else key.rpartition(".")[2]
        found = _found(name, str(value))
        if found:
            yield _fault(key, found)


def _name_of(key: str) -> str:
    """The last name of a dotted key; a place in a list has its list's."""
    return next((part for part in reversed(key.split(".")) if not part.isdigit()), "")


@cache
def _found(name: str, text: str) -> str:
    """What kind of secret a value is, or holds; empty if none."""
    if secrets.is_value(name, text):
        return f"the value of {name}" if name.isupper() else "a secret"
    for known in _known():
        if known in text:
            return "a secret of your environment"
    return next((each.what for each in secrets.find(text)), "")


@cache
def _known() -> tuple[str, ...]:
    return tuple(value for value in secrets.of_this_process().values if len(value) >= _LEAST_KNOWN)


def _fault(key: str, what: str) -> Fault:
    variable = key.removeprefix("cluster.env.") if key.startswith("cluster.env.") else ""
    of = re.search(r"value of (\w+)", what)
    name = variable or (of.group(1) if of else "")
    if "address" in what:
        fix = "leave it out of the address, and log in by the tool's own file (~/.netrc, ~/.aws/credentials; chmod 600)"
    else:
        line = f"{name}=…" if name else "NAME=…"
        fix = f"take it out here; `export {line}` before you launch, or the line {line} in {secrets.FILE}"
    return Fault(
        key=key,
        value=secrets.HIDDEN,
        problem=f"holds {what}, and what stands in a config is written to spec.yaml, job.sh and trackers"
        " (what you have typed is also in your shell's history)",
        allowed=ALLOWED,
        fix=fix,
    )


def hidden(found: Iterable[Fault], plain: Mapping[str, Any]) -> list[Fault]:
    """Other faults of a config that holds secrets, without these: a fault shows the value that it is about.

    Args:
        found: the faults.
        plain: the config.
    """
    hider = secrets.Hider([*_values("", plain), *secrets.values(os.environ)], least=1)
    return [
        dataclasses.replace(
            fault,
            value=hider.hide(fault.value),
            problem=hider.hide(fault.problem),
            nearest=hider.hide(fault.nearest),
            fix=hider.hide(fault.fix),
            fixes=tuple(hider.hide(fix) for fix in fault.fixes),
        )
        for fault in found
    ]


def _values(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield from _values(f"{key}.{name}".lstrip("."), below)
    elif isinstance(value, list | tuple):
        for index, below in enumerate(value):
            yield from _values(f"{key}.{index}", below)
    elif isinstance(value, str):
        if secrets.is_value(_name_of(key), value) and not _REFERENCE.fullmatch(f"{key}={value}"):
            yield value
        yield from (each.value for each in secrets.find(value))
