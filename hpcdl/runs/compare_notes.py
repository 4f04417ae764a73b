"""The lines below a comparison: what the figures are, which runs are the best, and what so few seeds can show."""

from __future__ import annotations

from collections.abc import Sequence

from hpcdl.runs import compare_groups
from hpcdl.runs.compare import Comparison
from hpcdl.runs.compare_groups import Group, Study
from hpcdl.runs.compare_text import BEST, FRONT, figure, header, short_ids, some

NAMED = 4
"""Runs that a line names, of many."""


def notes(comparison: Comparison, study: Study) -> list[str]:
    """What the figures are, in a line each."""
    lines = ["tokens/s, step: means over the logged steps but the first; memory: the highest of any rank"]
    if study.asked or study.seeds:
        return [] if study.asked and not study.seeds else lines
    rows = {row.run_id: row for row in comparison.rows}
    ids = short_ids(list(rows))
    others = {row.baseline: rows[row.baseline] for row in comparison.rows if row.baseline in rows}
    bases = [
        base for base in others.values() if any(r.baseline == base.run_id != r.run_id for r in rows.values())
    ]
    if bases:
        names = [f"{row.strategy} {row.nodes}×{row.processes_per_node} {ids[row.run_id]}" for row in bases]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        lines.append(f"eff.: tokens/s a process over that of {', '.join(names[:NAMED])}{more}")
    return lines


def best_of(study: Study) -> list[str]:
    """The best of each metric by name, and the front."""
    if len(study.groups) < 2:
        return []
    ids = short_ids([row.run_id for group in study.groups for row in group.rows])

    def names(groups: Sequence[Group]) -> str:
        shown = ", ".join(some(group, ids) for group in groups[:NAMED])
        return f"{shown} and {len(groups) - NAMED} more" if len(groups) > NAMED else shown

    said = []
    for metric in study.metrics:
        if best := study.best(metric):
            value = figure(metric.name, best[0].stats[metric.name].mean, precise=study.seeds)
            said.append(f"{header(metric.name)} {value} {names(best)}")
    lines = [f"{BEST} best: {' · '.join(said)}"] if said else []
    unknown = [metric.name for metric in study.metrics if not metric.better]
    if unknown:
        lines.append(
            f"of {', '.join(unknown)} no best: say {unknown[0]}:min or {unknown[0]}:max for what is good"
        )
    if study.pareto:
        front = [group for group in study.groups if group.on_front]
        axes = ", ".join(
            f"{'large' if m.better == 'max' else 'small'} {header(m.name)}" for m in study.pareto
        )
        lines.append(f"{FRONT} Pareto front ({axes}): {len(front)} of {len(study.groups)}: {names(front)}")
    return lines


def honest(study: Study) -> list[str]:
    """What the figures over seeds mean, and what they can't show."""
    if not study.seeds:
        return []
    first = study.metrics[0].name
    counts = [found.n for group in study.groups if (found := group.stats.get(first))]
    kinds = {test.kind for group in study.groups if (test := group.tests.get(first))}
    lines = ["±: standard deviation over the seeds that completed; 95 %: interval of the mean"]
    if kinds:
        how = {"paired": "paired by seed", "welch": "Welch's test"}
        said = " or ".join(how[kind] for kind in sorted(kinds))
        lines.append(
            f"p: {header(first)} against the best, t test ({said}), corrected for all pairs (Holm);"
            " 0.05 or more: may be chance"
        )
    elif len(study.groups) > 1:
        lines.append("p: nothing can be said: it takes two seeds or more of both, and some spread")
    if 1 in counts:
        lines.append("n = 1: one seed says nothing of the spread, and is tested against nothing")
    if few := sorted({n for n in counts if 2 <= n <= compare_groups.WEAK}):
        limits = ", ".join(f"{n} seeds none below {compare_groups.least_seen(n):.1f}" for n in few)
        lines.append(f"weak: in standard deviations of a run, {limits} can be told from chance")
    return lines
