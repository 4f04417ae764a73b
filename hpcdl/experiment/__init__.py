"""Plain dict → ExperimentSpec: every fault of a config is found, put into plain words and raised at once.

__init__.py   load, load_all, check: the order of the steps
sections.py   one section against its dataclass: unknown keys, wrong types, bounds (pydantic-core inside)
schema.py     the dataclasses as schemas of pydantic-core
words.py      what pydantic found, in words of ours: what is allowed, the nearest name, the fix
resolve.py    what a config leaves to be looked up: absolute paths, the shape in a model's config.json
places.py     keys that name a model, an adapter or a run, of methods and tasks
resuming.py   the checkpoint of another run that this one goes on from
secrets.py    secrets that stand in a config
rules.py      rules between sections
ranks.py      rules of the ranks: degrees and processes, the batch and who shares it
elastic.py    rules of a run that may lose nodes: every size that it may come down to
resources.py  rules of the cluster: what a partition has, what Slurm's options look like
kubernetes.py rules of cluster=kubernetes
login.py      rules of the login node that is submitted to over ssh
identity.py   spec → run id
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcdl.errors import ConfigError, Fault
from hpcdl.experiment import resolve, rules, secrets, sections
from hpcdl.experiment.identity import digest
from hpcdl.spec import ExperimentSpec, LaunchOptions

__all__ = ["Checked", "check", "digest", "formed", "load", "load_all", "merge_faults"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A config that was looked at: the experiment where nothing is wrong, else its faults."""

    spec: ExperimentSpec | None = None
    options: LaunchOptions | None = None
    """Also there where the experiment can't be: what the launcher does is no part of it."""
    faults: tuple[Fault, ...] = ()
    impossible: bool = False
    """Whether everything is right by itself and only doesn't go together (degrees and processes, a batch and
    its ranks, a request and its partition): a point of a sweep that can be left out."""


def load(plain: Mapping[str, Any]) -> tuple[ExperimentSpec, LaunchOptions]:
    """The experiment that a composed config describes, and what to do with it.

    Raises:
        ConfigError: something is wrong; carries every fault.
    """
    return load_all([("", plain)])[0]


def load_all(
    points: Sequence[tuple[str, Mapping[str, Any]]],
) -> list[tuple[ExperimentSpec, LaunchOptions]]:
    """Like `load` for all points of a sweep, each with the words that tell it from the others.

    Raises:
        ConfigError: something is wrong in at least one; carries every fault of all points, each once.
    """
    checked = [(where, check(plain)) for where, plain in points]
    faults = merge_faults((where, item.faults) for where, item in checked)
    if faults:
        raise ConfigError(faults)
    return [(item.spec, item.options) for _, item in checked if item.spec and item.options]


def check(plain: Mapping[str, Any], *, doubtful: Collection[str] = (), skip: Collection[str] = ()) -> Checked:
    """Looks at a whole config and raises nothing.

    Args:
        plain: the composed config.
        doubtful: sections that are not what was asked for, since an override of theirs is wrong: their own
            keys are looked at, the rules between sections would judge what nobody asked for.
        skip: sections that are not to be looked at at all, since their file could not be composed.
    """
    parts, faults = sections.validate(plain, skip)
    literal = secrets.faults(plain)
    parts, found = resolve.resolve(parts)
    trusted = {key: value for key, value in parts.items() if key not in doubtful}
    formed = not (faults or found or literal or doubtful or skip or rules.of_form(trusted))
    found += rules.broken(trusted)
    names = {field.name for field in dataclasses.fields(ExperimentSpec)}
    spec = ExperimentSpec(**{key: parts[key] for key in names}) if names <= parts.keys() else None
    if spec is not None:
        told = {fault.key for fault in found}
        found += [fault for fault in rules.refused(spec) if fault.key not in told]
    faults += [fault for fault in found if fault.key.split(".")[0] not in doubtful]
    if literal:
        kept = {fault.key for fault in literal}
        faults = literal + secrets.hidden((fault for fault in faults if fault.key not in kept), plain)
    if not formed:
        return Checked(faults=tuple(faults))
    options = LaunchOptions(**{key: value for key, value in parts.items() if key not in names})
    if faults:
        return Checked(options=options, faults=tuple(faults), impossible=True)
    return Checked(spec=spec, options=options)


def formed(plain: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Fault, ...]]:
    """A config's sections, and what is wrong with each by itself. Nothing is looked up: neither files nor other runs,
    which may be on another machine.
    """
    parts, faults = sections.validate(plain)
    literal = secrets.faults(plain)
    kept = {fault.key for fault in literal}
    others = [fault for fault in (*faults, *rules.of_form(parts)) if fault.key not in kept]
    return parts, tuple(literal + (secrets.hidden(others, plain) if literal else others))


def merge_faults(found: Iterable[tuple[str, Iterable[Fault]]]) -> tuple[Fault, ...]:
    """Faults of all points, each once: with the point it is in, or how many have it."""
    points: dict[Fault, list[str]] = {}
    total = 0
    for where, faults in found:
        total += 1
        for fault in faults:
            points.setdefault(fault, []).append(where)
    return tuple(
        dataclasses.replace(fault, where=_places(wheres, total)) if total > 1 else fault
        for fault, wheres in points.items()
    )


def _places(wheres: Sequence[str], total: int) -> str:
    if len(wheres) == total:
        return f"all {total} points of the sweep"
    more = f" and {len(wheres) - 3} more points" if len(wheres) > 3 else ""
    return "; ".join(wheres[:3]) + more
