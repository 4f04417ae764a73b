"""`after=RUN[,RUN]`: what a launch waits for, looked up on the login node.

Parents that have succeeded need no waiting; one that has failed refuses the launch; the others become Slurm's
`--dependency=afterok:…`, or are waited for by the local run's own shell (hpcdl.launch.parents).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpcdl.errors import ConfigError, Fault, UsageError
from hpcdl.experiment.resolve import absolute
from hpcdl.runs.parents import Parent
from hpcdl.runs.state import ACTIVE
from hpcdl.spec import LaunchOptions

if TYPE_CHECKING:
    from hpcdl.runs.reconcile import View

_JOB = re.compile(r"\d+(_\d+)?")
_FOLLOW = "hpcdl follow RUN && hpcdl launch … (without after): the second begins once the first has succeeded"
_OVERRIDE = re.compile(r"(\+{0,2}after)=(.*)", re.DOTALL)


def spelled(text: str) -> str:
    """An override of `after` in a form that Hydra takes for one text: `a,b` is a list of runs and no sweep."""
    found = _OVERRIDE.fullmatch(text)
    if found is None or found[2][:1] in ("'", '"') or found[2] in ("null", ""):
        return text
    value = found[2].removeprefix("[").removesuffix("]") if found[2].startswith("[") else found[2]
    quoted = value.replace("'", "\\'")
    return f"{found[1]}='{quoted}'"


def find(options: LaunchOptions, kinds: Collection[str]) -> tuple[Parent, ...]:
    """The runs and jobs that the launch waits for: those that are still to succeed.

    Args:
        options: with `after`.
        kinds: the kinds of the clusters that it launches on.

    Pods that wait for other runs would hold what these wait for, so nothing on Kubernetes waits.

    Raises:
        ConfigError: `after` names nothing, or something that failed or can't be waited for; carries every fault.
    """
    if options.after is None:
        return ()
    faults: list[Fault] = []
    parents: dict[str, Parent] = {}
    words = [word.strip() for word in options.after.split(",")]
    for word in words:
        try:
            found = _parents(word, options, kinds)
        except ConfigError as error:
            faults += error.faults
            continue
        parents.update({parent.name: parent for parent in found})
    if "kubernetes" in kinds and parents and not faults:
        waits = ", ".join(parents)
        problem = f"Kubernetes' Jobs can't wait for one another, and {waits} is not over"
        faults += _bad(options.after, problem, _FOLLOW).faults
    if faults:
        raise ConfigError(faults)
    return tuple(parents.values())


def _parents(word: str, options: LaunchOptions, kinds: Collection[str]) -> list[Parent]:
    """The runs behind one word that are still to succeed."""
    from hpcdl.runs import query
    from hpcdl.runs.reconcile import read, reconcile

    if not word:
        raise _bad(options.after or "", "a name is missing between the commas", "")
    try:
        runs = query.find(word, Path(absolute(options.runs_dir)))
    except UsageError as error:
        if _JOB.fullmatch(word) and "local" not in kinds:
            # A job of somebody else's, or one that hpcdl has not made.
            return [Parent(run=None, name=f"job {word}", job_id=word)]
        raise _bad(word, str(error).splitlines()[0], "hpcdl status lists the runs") from error
    reading = read(runs)
    views: Sequence[View] = reading.views
    if not options.dry_run and any(view.state.state in ACTIVE for view in views):
        views = reconcile(views)
    several = _JOB.fullmatch(word) or query.read_sweep(word, Path(absolute(options.runs_dir)))
    # An experiment's name means its newest run; an array or a sweep means all of it.
    chosen = views if several else [max(views, key=lambda view: view.state.created)]
    return [_parent(word, view, kinds) for view in chosen if view.state.state != "COMPLETED"]


def _parent(word: str, view: View, kinds: Collection[str]) -> Parent:
    state = view.state
    name = f"{state.run_id} ({state.name})"
    if state.state not in ACTIVE:
        why = f": {state.reason}" if state.reason else ""
        problem = f"{name} is {state.state} and will not succeed{why}"
        raise _bad(word, problem, f"hpcdl resubmit {state.run_id}, then launch this again")
    if "slurm" in kinds and state.kind != "slurm":
        where = "runs on this machine" if state.kind == "local" else "runs on Kubernetes"
        raise _bad(word, f"{name} {where}: Slurm's queue can't wait for it", "cluster=local")
    if state.kind == "slurm" and state.job_id is None:
        raise _bad(
            word, f"{name} has no job in Slurm's queue yet ({state.reason})", "launch this again in a moment"
        )
    return Parent(run=view.run, name=name, job_id=state.job_id)


def _bad(value: str, problem: str, fix: str) -> ConfigError:
    allowed = (
        "a run's id, directory or name, a sweep's id, a job id of Slurm's queue, latest; several with commas"
    )
    return ConfigError(
        [Fault(key="after", value=value, problem=problem, allowed=allowed, fix=fix or "after=null")]
    )
