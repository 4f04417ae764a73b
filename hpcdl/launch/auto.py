"""parallel=auto: the planner's choice in place of it, before the run has an id or a directory.

Here and not in hpcdl.experiment, which the planner stands on. What comes out is an experiment like any other: compute
nodes, run ids and a second launch see the strategy with its degrees.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hpcdl import experiment
from hpcdl.errors import Fault
from hpcdl.experiment import rules
from hpcdl.spec import ExperimentSpec, LaunchOptions, OptimSpec
from hpcdl.spec.plain import to_plain

if TYPE_CHECKING:
    from hpcdl.parallel.auto import Config
    from hpcdl.plan.found import Found


@dataclass(kw_only=True)
class Chooser:
    """The searches of one command line: equal points are searched once."""

    _found: dict[str, Found] = field(default_factory=dict)

    def choose(
        self, checked: experiment.Checked, typed: Collection[str]
    ) -> tuple[experiment.Checked, Found | None]:
        """The experiment with the planner's choice, and how it came to it.

        Args:
            checked: an experiment as it was composed; another strategy than auto is left as it is.
            typed: keys of the command line, which stay as they were typed.

        Returns:
            The chosen experiment, or the fault that nothing fits; None beside it where there was nothing to choose.
        """
        if checked.spec is None or not rules.is_open(checked.spec.parallel):
            return checked, None
        from hpcdl.plan import search_space  # only where somebody asks for it

        spec, kept = checked.spec, sorted(key for key in typed if "." in key or key == "quant")
        key = json.dumps([to_plain(_alike(spec)), kept], default=str)
        if key not in self._found:
            self._found[key] = _search(spec, kept, checked.options)
        found = self._found[key]
        if found.chosen is None:
            faults = (_nothing(found),)
            return experiment.Checked(options=checked.options, faults=faults, impossible=True), found
        ways = search_space.space(spec, 1, gpus=False, allow=())
        chosen = ways.applied(found.chosen.choice)
        return dataclasses.replace(checked, spec=chosen), found


def _alike(spec: ExperimentSpec) -> ExperimentSpec:
    """Without what changes neither memory nor time: points of a sweep over that are one search."""
    optim = OptimSpec(name=spec.optim.name, momentum=spec.optim.momentum)
    return dataclasses.replace(spec, name="", seed=0, code=None, optim=optim)


def _search(spec: ExperimentSpec, kept: Sequence[str], options: LaunchOptions | None) -> Found:
    from hpcdl.launch import calibrating
    from hpcdl.launch.points import runs_folder  # which imports what imports this
    from hpcdl.plan import hardware, search

    config: Config = spec.parallel  # type: ignore[assignment]  # it is open
    memory = None if config.memory_gb is None else int(config.memory_gb * 2**30)
    return search.search(
        spec,
        calibrating.applied(runs_folder(options or LaunchOptions()), hardware.of(spec)),
        allow=config.allow,
        keep=kept,
        memory_bytes=memory,
        memory_share=config.memory_share,
    )


def _nothing(found: Found) -> Fault:
    from hpcdl.plan import units

    fixes = found.remedies[:3]
    if not fixes and found.nearest is not None:
        fixes = (
            f"{units.gib(found.nearest.peak_bytes)} for each process and 10 % to spare, or a smaller model",
        )
    return Fault(
        key="parallel",
        value="auto",
        problem="; ".join(found.reasons) or "there is no way to share this out",
        allowed="a model, a batch and a cluster for which some way fits; hpcdl plan --search shows what comes nearest",
        fix="; or ".join(fixes) or "choose a strategy: parallel=fsdp, …",
    )


def told(found: Found) -> list[str]:
    """The choice and why, a line each, for a dry run and the head of spec.yaml."""
    from hpcdl.plan import found as words
    from hpcdl.plan import units

    if found.chosen is None:
        return []
    chosen = found.chosen
    lines = [
        f"parallel=auto chose {words.name(chosen.choice)}, {words.details(chosen.choice)}: by prediction"
        f" {units.seconds(chosen.step_s)} a step, {units.gib(chosen.peak_bytes)} a process"
    ]
    lines += found.reasons
    lines += [
        f"instead {words.name(lost.judged.choice)}, {words.details(lost.judged.choice)}: {lost.why}"
        for lost in found.runners_up[:3]
    ]
    return lines
