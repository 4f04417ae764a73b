"""`-m`: the points of a sweep, in Hydra's syntax and order, each composed and validated."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override, RangeSweep, ValueType
from hydra.types import RunMode
from omegaconf import OmegaConf

from hpcdl import experiment
from hpcdl.errors import ConfigError, Fault
from hpcdl.experiment import sections, words
from hpcdl.launch import after, auto
from hpcdl.launch.compose import Composed, Composer
from hpcdl.spec import ExperimentSpec, LaunchOptions

if TYPE_CHECKING:
    from hpcdl.plan.found import Found

MOST = 100_000
"""Points of one sweep: more are a slip of the pen, and would fill the memory of the login node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run that was asked for."""

    label: str
    """The overrides that tell it from the other points; empty for a single run."""
    spec: ExperimentSpec
    run_id: str
    """Digest of the experiment."""
    number: int = 0
    """Its place among all points that were asked for, from 0."""
    found: Found | None = None
    """How parallel=auto came to its strategy; None where it was given."""
    overrides: tuple[Override, ...] = ()
    """What makes it, none of them a sweep."""
    plain: Mapping[str, Any] | None = None
    """What it was composed to, where that was done on another machine, which has its files; else None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One point as it was composed: nothing was looked up for it yet, neither files nor other runs."""

    label: str
    """As a point's."""
    composed: Composed
    typed: frozenset[str]
    """Keys of the command line."""
    overrides: tuple[Override, ...] = ()
    """What makes it; empty where it was composed on another machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """All that a command line asks for, composed."""

    drafts: tuple[Draft, ...]
    """At least one."""
    faults: tuple[Fault, ...] = ()
    """Of the command line itself."""
    elsewhere: bool = False
    """Whether they were composed on another machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """One point of a sweep that can't be: it is left out and told, and the others go on."""

    label: str
    """As a point's."""
    faults: tuple[Fault, ...]
    """At least one."""
    number: int = 0
    """As a point's."""

    @property
    def reason(self) -> str:
        """The first fault in one line: `parallel.tp = 3: does not divide …`."""
        first = self.faults[0]
        return f"{first.key}{f' = {first.value}' if first.value else ''}: {first.problem}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a command line asks for."""

    points: tuple[Point, ...]
    """At least one."""
    refused: tuple[Refused, ...]
    """Points that can't be; empty for a single run, whose faults are an error."""
    options: LaunchOptions

    @property
    def swept(self) -> bool:
        """Whether it is a sweep of several points."""
        return len(self.points) + len(self.refused) > 1


def read(composer: Composer, texts: Sequence[str], *, multirun: bool) -> Asked:
    """Everything that a command line asks for, composed and validated.

    Args:
        composer: Hydra with its folders.
        texts: the overrides as typed.
        multirun: whether `-m` was given.

    Raises:
        ConfigError: a fault of form in any point, or no point can be, or one can't with `strict=true`; carries
            every fault of all of them.
    """
    return judge(compose(composer, texts, multirun=multirun))


def compose(composer: Composer, texts: Sequence[str], *, multirun: bool) -> Drafts:
    """What a command line asks for, composed and not looked at yet; arguments as `read` has them.

    Raises:
        ConfigError: the sweep has no end.
    """
    overrides, faults = composer.parse([after.spelled(text) for text in texts])
    if multirun:
        overrides = _from_files(composer, overrides) + overrides
    if multirun and (count := _count(overrides)) > MOST:
        raise ConfigError([*faults, _too_many(overrides, count)])
    expanded = expand(overrides) if multirun else [tuple(overrides)]
    faults += [fault for override in overrides if (fault := _not_a_sweep(override, multirun))]
    if any(override.is_sweep_override() for point in expanded for override in point):
        expanded = [tuple(o for o in point if not o.is_sweep_override()) for point in expanded[:1]]
    labels = _labels(overrides, expanded) if multirun else [""]
    return Drafts(
        drafts=tuple(
            Draft(
                label=label,
                composed=composer.compose(point),
                typed=frozenset(override.key_or_group for override in point),
                overrides=tuple(point),
            )
            for label, point in zip(labels, expanded, strict=True)
        ),
        faults=tuple(faults),
    )


def judge(asked: Drafts) -> Asked:
    """What was composed, validated; raises what `read` does."""
    labels, faults = [draft.label for draft in asked.drafts], asked.faults
    checked = [_check(draft.composed, faults) for draft in asked.drafts]
    swept_options = _swept_options([c.options for c in checked if c.options])
    if faults or swept_options or _are_wrong(checked):
        raise ConfigError((*faults, *_merged(labels, checked), *swept_options))
    chooser = auto.Chooser()
    chosen = [chooser.choose(item, draft.typed) for item, draft in zip(checked, asked.drafts, strict=True)]
    checked = [item for item, _ in chosen]
    if _are_wrong(checked):
        raise ConfigError(_merged(labels, checked))
    return _sorted_out(asked, checked, [found for _, found in chosen])


def _merged(labels: Sequence[str], checked: Sequence[experiment.Checked]) -> tuple[Fault, ...]:
    return experiment.merge_faults(zip(labels, (item.faults for item in checked), strict=True))


def _are_wrong(checked: Sequence[experiment.Checked]) -> bool:
    """Whether the faults of these points refuse the whole."""
    wrong = [item for item in checked if item.faults]
    strict = any(item.options and item.options.strict for item in checked)
    return bool(wrong) and (
        strict or len(wrong) == len(checked) or not all(item.impossible for item in wrong)
    )


def _sorted_out(
    asked: Drafts, checked: Sequence[experiment.Checked], searched: Sequence[Found | None]
) -> Asked:
    made, refused = [], []
    for number, (draft, item, found) in enumerate(zip(asked.drafts, checked, searched, strict=True)):
        label = draft.label
        if item.spec is None:
            # First what was swept: of the rest, nobody has asked for anything new.
            faults = sorted(item.faults, key=lambda fault: f"{fault.key}=" not in label)
            refused.append(Refused(label=label, faults=tuple(faults), number=number))
        else:
            run_id = experiment.digest(item.spec)
            made.append(
                Point(
                    label=label,
                    spec=item.spec,
                    run_id=run_id,
                    number=number,
                    found=found,
                    overrides=draft.overrides,
                    plain=draft.composed.plain if asked.elsewhere else None,
                )
            )
    options = checked[0].options
    assert options is not None
    return Asked(points=tuple(made), refused=tuple(refused), options=options)


def _count(overrides: Sequence[Override]) -> float:
    """How many points `expand` would make, without making one."""
    axes = {override.get_key_element(): _length(override) for override in overrides}
    return math.prod(axes.values())


def _length(override: Override) -> float:
    """How many values an override gives: of a range they are counted, for they may be more than memory holds."""
    span = override._value
    if not isinstance(span, RangeSweep):
        return len(_elements(override)) if override.is_discrete_sweep() else 1
    if span.start is None or span.stop is None:
        return 0
    way = (float(span.stop) - float(span.start)) * (-1 if span.step < 0 else 1)
    if way <= 0:
        return 0
    return math.inf if math.isnan(way) or not span.step else way / abs(span.step)


def _too_many(overrides: Sequence[Override], count: float) -> Fault:
    swept = [override for override in overrides if override.is_discrete_sweep()]
    widest = max(swept, key=_length)
    many = "without end" if math.isinf(count) else f"of {count:.3g} points"
    return Fault(
        key=widest.get_key_element(),
        value=widest.get_value_string(),
        problem=f"makes a sweep {many}, each of which is a run with a directory of its own",
        allowed=f"at most {MOST} points in one sweep",
        fix=f"{widest.get_key_element()}=a,b with fewer values, or several sweeps",
    )


def expand(overrides: Sequence[Override]) -> list[tuple[Override, ...]]:
    """The points that these overrides span, in the order of Hydra's own sweeper.

    A key that is given twice counts once, in its first place with its last value, as Hydra has it.
    """
    axes: dict[str, list[Override]] = {}
    for override in overrides:
        key = override.get_key_element()
        axes[key] = _elements(override) if override.is_discrete_sweep() else [override]
    return list(itertools.product(*axes.values()))


def _elements(override: Override) -> list[Override]:
    """The override once for each of its values, without parsing each anew."""
    key = override.get_key_element()
    return [
        dataclasses.replace(
            override,
            value_type=ValueType.ELEMENT,
            _value=value,
            input_line=f"{key}={Override._get_value_element_as_str(value)}",
        )
        for value in override.sweep_iterator()
    ]


def _from_files(composer: Composer, overrides: Sequence[Override]) -> list[Override]:
    """Sweeps that a file holds, where Hydra looks for them: `hydra.sweeper.params`."""
    choices = [o for o in overrides if composer.is_choice(o) and not o.is_sweep_override()]
    hydra = composer.files(choices, RunMode.MULTIRUN).hydra
    params = OmegaConf.select(hydra, "hydra.sweeper.params") if hydra is not None else None
    found, faults = composer.parse([f"{key}={value}" for key, value in (params or {}).items()])
    if faults:
        raise ConfigError(faults)
    return found


def _not_a_sweep(override: Override, multirun: bool) -> Fault | None:
    if not override.is_sweep_override():
        return None
    key, value = override.get_key_element(), override.get_value_string()
    if not multirun:
        return Fault(
            key=key,
            value=value,
            problem="has several values: a sweep, which needs -m",
            allowed=f"-m for a run each, {key}=[{value}] for a list, or the value in quotes for text",
            fix=words.shell(f"{key}=[{value}]") + ", or put -m before the overrides",
        )
    if not override.is_discrete_sweep():
        return Fault(
            key=key,
            value=value,
            problem="an interval has no points that could be counted",
            allowed="key=a,b,c, choice(a,b,c), range(start,stop,step), glob(pattern)",
            fix=words.shell(f"{key}=range(1,5)"),
        )
    if override.is_hydra_override():
        return Fault(
            key=key, value=value, problem="Hydra's own settings can't be swept", fix=f"leave {key} out"
        )
    if not _length(override):
        return Fault(
            key=key, value=value, problem="matches nothing: the sweep has no points", fix=f"{key}=a,b"
        )
    return None


def _labels(overrides: Sequence[Override], expanded: Sequence[tuple[Override, ...]]) -> list[str]:
    swept = {override.get_key_element() for override in overrides if override.is_sweep_override()}
    return [" ".join(str(o.input_line) for o in point if o.get_key_element() in swept) for point in expanded]


def _check(composed: Composed, unread: Sequence[Fault]) -> experiment.Checked:
    """One point; `unread` are the faults of overrides that could not even be read, and so are not in it."""
    if not composed.faults and not unread:
        return experiment.check(composed.plain)
    doubtful = {fault.key.split(".")[0] for fault in (*composed.faults, *unread)} | composed.incomplete
    known = sections.top_level().keys()
    if not doubtful <= known:  # an experiment, a flag: it may have meant any section
        doubtful = set(known)
    found = experiment.check(composed.plain, doubtful=doubtful, skip=composed.incomplete)
    told = {fault.key for fault in composed.faults}
    new = tuple(fault for fault in found.faults if fault.key not in told)
    return experiment.Checked(faults=composed.faults + new)


def _swept_options(options: Sequence[LaunchOptions]) -> tuple[Fault, ...]:
    """What the launcher does is the same for all points."""
    names = [field.name for field in dataclasses.fields(LaunchOptions)]
    return tuple(
        Fault(
            key=name,
            value=words.typed(sorted({str(getattr(option, name)) for option in options})),
            problem="can't differ between the points of a sweep: it is what the launcher does",
            fix=f"give {name} one value",
        )
        for name in names
        if len({getattr(option, name) for option in options}) > 1
    )
