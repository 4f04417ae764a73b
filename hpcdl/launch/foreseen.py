"""`hpcdl plan`: what a launch with the same words would submit, and what is planned for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpcdl.errors import ConfigError
from hpcdl.launch import arguments, backends, expected, planning, points, report, sweep
from hpcdl.launch.compose import CONFIG_NAME, Composer
from hpcdl.launch.points import Planned, runs_folder
from hpcdl.launch.sweep import Asked, Point
from hpcdl.plan.view import Shown
from hpcdl.runs.store import RunDir

if TYPE_CHECKING:
    from hpcdl.plan.found import Found

MOST_ASKED = 3
"""Of a sweep's shapes, for so many Slurm is asked when they would start."""


@dataclass(kw_only=True)
class Foreseen:
    """What a command line asks for, and its planner."""

    asked: Asked
    planner: planning.Planner

    def shown(self) -> list[Shown]:
        """Each point's plan, in the order in which they were given."""
        starts: dict[str, expected.Expected] = {}
        found = []
        for point in self.asked.points:
            start = self._start(point, starts)
            plan = self.planner.plan(point.spec)
            found.append(
                Shown(spec=point.spec, plan=plan, label=point.label, start=start.said, start_time=start.time)
            )
        return found

    def searched(self) -> list[tuple[str, Found]]:
        """Each point's label, and the quickest way to share it out that fits."""
        from hpcdl.plan import search

        return [
            (point.label, point.found or search.search(point.spec, self.planner.hardware(point.spec)))
            for point in self.asked.points
        ]

    def refused_lines(self) -> list[str]:
        """Points that can't be, and why."""
        return report.refused_lines(self.asked.refused)

    def _start(self, point: Point, known: dict[str, expected.Expected]) -> expected.Expected:
        """When the point by itself would start; equal requests are asked for once."""
        cluster = point.spec.cluster
        if cluster.kind != "slurm":
            return expected.Expected()
        key = repr(cluster)
        if key not in known:
            if len(known) >= MOST_ASKED:
                return expected.Expected()
            options = self.asked.options
            run = RunDir(runs_folder(options) / point.spec.name / point.run_id)
            item = Planned(spec=point.spec, run=run, labels=(point.label,), action="new")
            request = points.request([item], cluster, options, ())
            known[key] = expected.start(backends.get(cluster.kind).render(request))
        return known[key]


def read(argv: Sequence[str]) -> Foreseen:
    """Composes and validates as a launch does.

    Raises:
        ConfigError: what a launch would say, but for memory that doesn't fit: that is shown.
    """
    flags = arguments.parse(argv)
    composer = Composer(config_dir=flags.config_dir, config_name=flags.config_name or CONFIG_NAME)
    asked = sweep.read(composer, flags.overrides, multirun=flags.multirun)
    faults = [fault for point in asked.points for fault in planning.faults_of(point.spec)]
    if faults:
        raise ConfigError(dict.fromkeys(faults))
    planner = planning.Planner(runs_dir=runs_folder(asked.options))
    return Foreseen(asked=asked, planner=planner)
