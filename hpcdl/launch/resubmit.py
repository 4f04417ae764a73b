"""`hpcdl resubmit RUN… --only failed,timeout,oom`: runs that ended too early go on from their last checkpoint.

The same runs with the same ids, from their own spec.yaml: nothing is composed anew. Overrides may change what is
no part of a run's identity (memory, time limit, partition, …). Runs that waited for others which are taken up
again here wait for those again.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcdl import experiment
from hpcdl.errors import ConfigError, Fault, UsageError, nearest_name
from hpcdl.experiment.identity import identifying
from hpcdl.launch import after, planning, points, report
from hpcdl.launch.compose import Composer
from hpcdl.launch.points import Planned
from hpcdl.launch.sweep import Asked
from hpcdl.runs import parents, query
from hpcdl.runs.parents import Parent
from hpcdl.runs.reconcile import View, reconcile
from hpcdl.runs.state import ACTIVE
from hpcdl.spec import LaunchOptions
from hpcdl.spec.plain import load_yaml, to_plain

WORDS = {
    "failed": "FAILED",
    "timeout": "TIMEOUT",
    "oom": "OUT_OF_MEMORY",
    "node_fail": "NODE_FAIL",
    "preempted": "PREEMPTED",
    "cancelled": "CANCELLED",
}
"""What `--only` takes, and Slurm's word for it."""
DEFAULT = ("failed", "timeout", "oom", "node_fail", "preempted")
"""What was cancelled was most likely meant to be."""
_OPTIONS = frozenset(field.name for field in dataclasses.fields(LaunchOptions))
"""Keys of what the launcher does, which are no part of any run."""
_IS_OVERRIDE = re.compile(r"[+~]{0,2}[A-Za-z_][\w./@]*=", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What is to be done."""

    levels: tuple[tuple[Planned, ...], ...]
    """Runs of a later level wait for runs of an earlier one."""
    options: LaunchOptions
    left_out: str
    """The others that were named, by their state; empty where there are none."""
    waits: dict[Path, tuple[Parent, ...]]
    """What each run waits for, by its directory."""
    warnings: tuple[str, ...] = ()
    """What of them may not fit into memory."""

    @property
    def count(self) -> int:
        """How many runs."""
        return sum(len(level) for level in self.levels)


def states(text: str | None) -> frozenset[str]:
    """Slurm's words for what `--only` names.

    Raises:
        UsageError: there is no such state.
    """
    names = [name.strip().lower() for name in text.split(",")] if text is not None else list(DEFAULT)
    by_word = {**WORDS, **{state.lower(): state for state in WORDS.values()}}
    for name in names:
        if name not in by_word:
            near = nearest_name(name, by_word)
            hint = f"; nearest name: {near}" if near else ""
            raise UsageError(f"--only {name}: there is no such state{hint}\nallowed: {', '.join(WORDS)}")
    return frozenset(by_word[name] for name in names)


def choose(words: Sequence[str], only: str | None, folder: Path) -> Chosen:
    """Finds the runs, and what each would be submitted as.

    Args:
        words: runs as the user names them, and overrides.
        only: the states that are meant, with commas; None: all that ended too early.
        folder: the folder of all runs.

    Raises:
        UsageError: no run was named, or none is in such a state.
        ConfigError: an override is wrong, or would make another run of it; carries every fault.
    """
    meant = states(only)
    overrides = [word for word in words if _IS_OVERRIDE.match(word)]
    names = [word for word in words if word not in overrides]
    if not names:
        raise UsageError("no run was named: hpcdl resubmit RUN… [--only failed,timeout,oom] [KEY=VALUE…]")
    reading = query.read_all(names, folder)
    if reading.faults:
        raise UsageError("\n".join(reading.faults))
    views = reconcile(reading.views)
    chosen = [view for view in views if view.state.state in meant]
    others = Counter(view.state.state for view in views if view.state.state not in meant)
    left_out = ", ".join(f"{count} {state}" for state, count in sorted(others.items()))
    if not chosen:
        raise UsageError(
            f"nothing to resubmit: of {len(views)} runs, {left_out}; --only takes {', '.join(WORDS)}"
        )
    composer = Composer()
    checked = [_check(view, overrides, composer, folder) for view in chosen]
    faults = experiment.merge_faults(
        (view.state.run_id, item.faults) for view, item in zip(chosen, checked, strict=True)
    )
    if faults:
        raise ConfigError(faults)
    options = checked[0].options
    assert options is not None
    planned = [_planned(view, item) for view, item in zip(chosen, checked, strict=True)]
    planned, warnings = planning.again(planned, folder)
    waits = _waits(chosen, options)
    return Chosen(
        levels=_levels(planned, waits), options=options, left_out=left_out, waits=waits, warnings=warnings
    )


def _planned(view: View, checked: experiment.Checked) -> Planned:
    assert checked.spec is not None
    label = f"after it was {view.state.state}"
    return Planned(spec=checked.spec, run=view.run, labels=(label,), action="resume", view=view)


def _check(view: View, overrides: Sequence[str], composer: Composer, folder: Path) -> experiment.Checked:
    """The run's own experiment with the overrides in it."""
    plain = {**load_yaml(view.run.spec_file), "runs_dir": str(folder)}
    parsed, faults = composer.parse([after.spelled(text) for text in overrides])
    for override in parsed:
        if composer.is_choice(override) or override.is_sweep_override():
            faults.append(
                Fault(
                    key=override.key_or_group,
                    value=override.get_value_string(),
                    problem="resubmit changes single values of runs that are there",
                    fix="cluster.mem_gb=…, cluster.time_min=…, or hpcdl launch for another experiment",
                )
            )
    if faults:
        return experiment.Checked(faults=tuple(faults))
    changed = composer.changed(plain, parsed)
    if changed.faults:
        return experiment.Checked(faults=changed.faults)
    checked = experiment.check(changed.plain)
    other = _other_keys(plain, changed.plain, [o.key_or_group for o in parsed])
    return dataclasses.replace(checked, faults=(*checked.faults, *other))


def _other_keys(before: dict[str, Any], now: dict[str, Any], keys: Sequence[str]) -> list[Fault]:
    """Overrides that would make another experiment of it."""
    return [
        Fault(
            key=key,
            value=str(_value(now, key)),
            problem="is part of what the run is: with another value it is another run",
            allowed="what changes neither the result nor what is measured: cluster.mem_gb, cluster.time_min, …",
            fix=f"leave {key} out, or launch a new run with it",
        )
        for key in keys
        if _differs(before, now, key)
    ]


def _differs(before: dict[str, Any], now: dict[str, Any], key: str) -> bool:
    """Whether this key's change alone changes the experiment."""
    section, _, rest = key.partition(".")
    if section in _OPTIONS:
        return False
    one = {**before, section: now.get(section)}
    if rest and isinstance(before.get(section), dict):
        first = rest.split(".")[0]
        one[section] = {**before[section], first: now[section].get(first)}
    return identifying(before) != identifying(one)


def _value(plain: Any, key: str) -> Any:
    for part in key.split("."):
        plain = plain.get(part) if isinstance(plain, dict) else None
    return to_plain(plain)


def _waits(chosen: Sequence[View], options: LaunchOptions) -> dict[Path, tuple[Parent, ...]]:
    """What each run waits for: what `after` says now, or what it waited for before and that isn't done.

    Raises:
        ConfigError: one waits for a run that has failed and isn't taken up again here.
    """
    if options.after is not None:
        found = after.find(options, {view.state.kind for view in chosen})
        return {view.run.path: found for view in chosen}
    again = {view.run.path for view in chosen}
    waits: dict[Path, tuple[Parent, ...]] = {}
    faults = []
    for view in chosen:
        before = parents.unfinished(parents.of_submission(view.run.runs_dir, view.state.submission))
        waits[view.run.path] = before
        for parent in before:
            state = parent.state()
            if parent.run is None or parent.run.path in again or (state and state.state in ACTIVE):
                continue
            faults.append(
                Fault(
                    key=view.state.run_id,
                    value="",
                    problem=f"waits for {parent.name}, which is {state.state if state else 'deleted'}",
                    fix=f"name {parent.run.path.name} as well, or say after=null"
                    if state
                    else "say after=null to launch it without waiting",
                )
            )
    if faults:
        raise ConfigError(faults)
    return waits


def _levels(
    planned: Sequence[Planned], waits: dict[Path, tuple[Parent, ...]]
) -> tuple[tuple[Planned, ...], ...]:
    """Runs in the order in which their submissions can name each other's jobs."""
    left = {item.run.path: item for item in planned}
    levels = []
    while left:
        ready = [
            item
            for path, item in left.items()
            if not any(p.run is not None and p.run.path in left for p in waits[path])
        ]
        assert ready, "a run can't wait for itself: it was launched after what it waits for"
        levels.append(tuple(ready))
        for item in ready:
            del left[item.run.path]
    return tuple(levels)


def submit(chosen: Chosen) -> int:
    """Submits, or prints what would be submitted; returns the exit code.

    Raises:
        SchedulerError: the scheduler has refused, or does not answer.
    """
    from hpcdl.launch import running

    options = chosen.options
    asked = Asked(points=(), refused=(), options=dataclasses.replace(options, wait=False))
    code, sent = 0, []
    for level in chosen.levels:
        groups: dict[tuple[Parent, ...], list[Planned]] = {}
        for item in level:
            fresh = tuple(_as_it_stands(p, options) for p in chosen.waits[item.run.path])
            groups.setdefault(tuple(p for p in fresh if p is not None), []).append(item)
        made = [batch for key, items in groups.items() for batch in points.batches(items, options, key)]
        if options.dry_run:
            report.dry_run(made, [])
            continue
        code = max(code, running.launch(level, made, asked))
        sent += [item.run for item in level if item.spec.cluster.kind != "local"]
        if code == running.INTERRUPTED:
            return code
    if options.wait and sent:
        code = max(code, running.wait_for(sent, options))
    return code


def _as_it_stands(parent: Parent, options: LaunchOptions) -> Parent | None:
    """What is waited for, with the job that it has now; None where it is done by now."""
    state = parent.state()
    if state is None:
        return parent
    if state.state == "COMPLETED":
        return None
    job_id = state.job_id
    if state.kind == "slurm" and (job_id is None or state.state not in ACTIVE) and options.dry_run:
        job_id = f"JOB_OF_{state.run_id}"
    return dataclasses.replace(parent, job_id=job_id)
