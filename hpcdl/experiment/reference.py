"""Every key of a config: what it takes, what it is by default, what it means. Read from the spec itself.

Types and bounds come from the dataclasses of hpcdl/spec and of each strategy, method and task; meanings from the
docstrings below their fields; defaults from the files of conf/. Nothing is written twice, so nothing here can be old.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hpcdl.experiment import sections, words
from hpcdl.spec import ExperimentSpec, LaunchOptions
from hpcdl.spec.options import config_folder
from hpcdl.spec.plain import load_yaml

GENERAL = "general"
"""Keys at the root of a config, as a section."""
_NONE = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key, as one file of its group (or several alike) has it."""

    key: str
    """Dotted."""
    allowed: str
    """What it takes, in words."""
    default: str
    """As typed; empty where it must be given."""
    default_in: str
    """The file that says so, below conf/; empty: the code does."""
    others: tuple[tuple[str, str], ...]
    """Files of the group with another value, and theirs."""
    options: tuple[str, ...]
    """The strategies, methods or tasks that have it; empty: all of the group."""
    meaning: str
    """A sentence or a few."""

    @property
    def last(self) -> str:
        """Its name without its section."""
        return self.key.rpartition(".")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A group of keys: a folder of conf/."""

    name: str
    """As on the command line, `trainer`; or GENERAL."""
    meaning: str
    """A sentence or a few."""
    files: tuple[str, ...]
    """What can be chosen with NAME=FILE, the default first."""
    keys: tuple[Key, ...]
    """In the order of the spec."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A field on the way: the same key may be another in another file's class."""

    key: str
    hint: Any
    default: Any
    meaning: str


@cache
def all_sections() -> tuple[Section, ...]:
    """General keys first, then the groups as an experiment has them."""
    groups = {name: hint for name, hint in sections.top_level().items() if _is_group(hint)}
    return (_general(frozenset(groups)), *(_section(name, hint) for name, hint in groups.items()))


def all_keys() -> list[Key]:
    """All of them; a key that differs between strategies stands there once for each of its kinds."""
    return [key for section in all_sections() for key in section.keys]


def find(name: str) -> list[Key]:
    """A dotted key, or the last word of one; empty where there is none."""
    exact = [key for key in all_keys() if key.key == name]
    return exact or [key for key in all_keys() if key.last == name]


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


@cache
def docstrings(cls: type) -> dict[str, str]:
    """What stands below each field of a dataclass and its bases, in one line each."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        if dataclasses.is_dataclass(part):
            body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
            assert isinstance(body, ast.ClassDef)
            found.update(_below(body))
    return found


def _below(body: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, after in zip(body.body, body.body[1:], strict=False):
        match field, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())


def _general(groups: frozenset[str]) -> Section:
    found = [
        item for cls in (ExperimentSpec, LaunchOptions) for item in _fields(cls, "") if item.key not in groups
    ]
    folder = config_folder()
    values = {} if folder is None else {"config": load_yaml(folder / "config.yaml")}
    keys = tuple(_key(item, values, "", ()) for item in found)
    meaning = "What the launcher does with an experiment, and what belongs to none of its sections."
    return Section(name=GENERAL, meaning=meaning, files=(), keys=keys)


def _section(name: str, hint: type) -> Section:
    values = _files(name)
    classes = sections.FOUND_BY_NAME.get(hint)
    kinds: dict[tuple[str, ...], list[_Found]]
    if classes is None:
        kinds = {(): _fields(hint, f"{name}.")}
    else:
        kinds = {(option,): _fields(classes.get(option).Config, f"{name}.") for option in classes.names()}
    merged = _merged(kinds)
    by = sections.NAMED_BY.get(hint, "name")
    keys = []
    for item, options in merged:
        own = {f: v for f, v in values.items() if not options or v.get(by) in options}
        key = _key(item, own, name, options)
        if classes is not None and item.key == f"{name}.{by}":  # the one that says which class it is
            key = dataclasses.replace(key, allowed=f"one of {', '.join(classes.names())}", others=())
        keys.append(key)
    meaning = " ".join((inspect.getdoc(hint) or "").split("Base class:")[0].split())
    return Section(name=name, meaning=meaning, files=tuple(values), keys=tuple(keys))


def _merged(kinds: Mapping[tuple[str, ...], list[_Found]]) -> list[tuple[_Found, tuple[str, ...]]]:
    """Keys that several strategies have with the same words become one; those that all have name none of them."""
    where: dict[tuple[str, str, str], tuple[_Found, list[str]]] = {}
    for options, found in kinds.items():
        for item in found:
            same = (item.key, words.allowed(item.hint), item.meaning)
            where.setdefault(same, (item, []))[1].extend(options)
    order = list(dict.fromkeys(key for key, _, _ in where))
    everywhere = sum(len(options) for options in kinds)
    merged = [
        (item, () if len(options) == everywhere else tuple(options)) for item, options in where.values()
    ]
    return sorted(merged, key=lambda pair: (order.index(pair[0].key), -len(pair[1])))


def _fields(cls: type, prefix: str) -> list[_Found]:
    hints, said = words.hints(cls), docstrings(cls)
    found = []
    for field in dataclasses.fields(cls):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        item = _Found(
            key=key, hint=hint, default=sections.default_of(field), meaning=said.get(field.name, "")
        )
        found.append(item)
        found += [inner for part, inside in _nested(hint) for inner in _fields(inside, f"{key}.{part}")]
    return found


def _nested(hint: Any) -> Iterator[tuple[str, type]]:
    """Groups of keys inside a field of a section: `model.shape`, `cluster.partitions.NAME`."""
    for member in words.parts_of(hint)[0]:
        if typing.get_origin(member) is dict:
            yield from (("NAME." + part, inside) for part, inside in _nested(typing.get_args(member)[1]))
        elif _is_group(member) and member not in sections.top_level().values():
            yield "", member


def _key(item: _Found, values: Mapping[str, Any], section: str, options: tuple[str, ...]) -> Key:
    """With its default and where that stands; a file that leaves the key out (site_example) counts as none."""
    path = item.key.split(".")[1 if section else 0 :]
    there = {name: value for name, file in values.items() if (value := _at(file, path)) is not _NONE}
    first = next(iter(there), None)
    if first is not None:
        default, default_in = words.typed(there[first], 200), f"{section}/{first}.yaml".lstrip("/")
    else:
        missing = item.default is dataclasses.MISSING
        default, default_in = "" if missing else words.typed(item.default, 200), ""
    others = {name: words.typed(value, 200) for name, value in there.items()}
    return Key(
        key=item.key,
        allowed=words.allowed(item.hint),
        default=default,
        default_in=default_in,
        others=tuple((name, value) for name, value in others.items() if value != default),
        options=options,
        meaning=item.meaning,
    )


def _at(value: Any, path: list[str]) -> Any:
    for part in path:
        if not isinstance(value, Mapping) or part not in value:
            return _NONE
        value = value[part]
    return value


def _files(group: str) -> dict[str, Any]:
    """Files of a group by name, the one that conf/config.yaml chooses first."""
    folder = config_folder()
    if folder is None:
        return {}
    chosen = next((d[group] for d in _defaults(folder) if group in d), "")
    paths = sorted(folder.glob(f"{group}/*.yaml"), key=lambda path: (path.stem != chosen, path.stem))
    return {path.stem: load_yaml(path) for path in paths}


@cache
def _defaults(folder: Path) -> list[dict[str, str]]:
    return [item for item in load_yaml(folder / "config.yaml")["defaults"] if isinstance(item, dict)]
