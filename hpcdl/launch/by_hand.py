"""A job that was submitted by hand finds its run: `sbatch slurm/torchrun.sbatch +experiment=…`.

`python -m hpcdl.launch.by_hand OVERRIDE…` runs once in the batch script, on the job's first node, and prints the
path of the runs file for the agents; nothing if the run is complete already. What the job has (nodes, CPUs)
goes before what the overrides say, since it can't be changed any more. In an array each task takes its point of
the sweep. A requeued job composes nothing: an edit of a YAML file meanwhile changes nothing.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpcdl.errors import ConfigError, HpcdlError, UsageError
from hpcdl.runs import private
from hpcdl.runs.store import SUBMISSIONS
from hpcdl.spec.experiment import ExperimentSpec, default_runs_dir

if TYPE_CHECKING:
    from hpcdl.launch import sweep


def main(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """Prints the runs file; returns the exit code. A user's fault is shown, no traceback."""
    try:
        found = find(argv, environment)
    except HpcdlError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if found is not None:
        print(found)
    return 0


def find(overrides: Sequence[str], environment: Mapping[str, str]) -> Path | None:
    """The runs file of this job; None if its run is complete.

    Raises:
        HpcdlError: the config is wrong, there is no such point, or another job has the run.
    """
    token = _token(environment)
    if int(environment.get("SLURM_RESTART_COUNT") or 0) > 0:
        earlier = _runs_dir(overrides) / SUBMISSIONS / token / "runs.txt"
        if earlier.exists():
            return earlier
    return _first_start(overrides, environment, token)


def _token(environment: Mapping[str, str]) -> str:
    """The submission's name: the job's id as Slurm's commands take it."""
    if "SLURM_JOB_ID" not in environment:
        raise UsageError(
            "there is no Slurm job here: sbatch slurm/torchrun.sbatch OVERRIDE…, or hpcdl launch"
        )
    return f"hand-{_job_id(environment)}"


def _job_id(environment: Mapping[str, str]) -> str:
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"]


def _runs_dir(overrides: Sequence[str]) -> Path:
    """Where the first start has put the run, read off the command line: nothing is composed."""
    given = [text.partition("=")[2] for text in overrides if text.lstrip("+").startswith("runs_dir=")]
    return Path(given[-1] if given else default_runs_dir()).expanduser().absolute()


def _first_start(overrides: Sequence[str], environment: Mapping[str, str], token: str) -> Path | None:
    from hpcdl.launch import arguments, points, submit
    from hpcdl.launch import sweep as sweeps
    from hpcdl.launch.compose import CONFIG_NAME, Composer

    flags = arguments.parse(overrides)
    composer = Composer(config_dir=flags.config_dir, config_name=flags.config_name or CONFIG_NAME)
    task = environment.get("SLURM_ARRAY_TASK_ID")
    asked = sweeps.read(composer, _with_the_jobs(flags.overrides, environment), multirun=task is not None)
    point, options = _point(asked, int(task or 0)), asked.options
    if Path(options.runs_dir).expanduser().absolute() != _runs_dir(overrides):
        raise UsageError(
            f"runs_dir={options.runs_dir} stands in a YAML file, where a requeued job doesn't look\n"
            f"fix: put it on the command line, or export HPCDL_RUNS={options.runs_dir}"
        )
    if options.after is not None:
        raise UsageError(
            f"after={options.after}: this job has started already, and can't wait\n"
            "fix: sbatch --dependency=afterok:JOB --kill-on-invalid-dep=yes …, or hpcdl launch … after=RUN"
        )
    if point.spec.cluster.kind != "slurm":
        raise UsageError("this is a Slurm job: leave cluster=local out")
    if point.spec.cluster.container != "none":
        raise UsageError(
            f"cluster.container={point.spec.cluster.container}: this script was sent without a container\n"
            "fix: hpcdl launch …, or fill HPCDL_INSIDE in, in a copy of slurm/torchrun.sbatch, and leave the key out"
        )
    (planned,) = points.plan([point], options)
    if planned.action == "done":
        print(f"{planned.run.path} is complete already; force=true makes a new run", file=sys.stderr)
        return None
    if planned.action == "active":
        assert planned.view is not None
        state = planned.view.state
        raise UsageError(f"{planned.run.path} is {state.state} already, as job {state.job_id or '-'}")
    planned = dataclasses.replace(planned, spec=_with_cpus(planned.spec, flags.overrides, environment))
    request = dataclasses.replace(
        points.request([planned], planned.spec.cluster, options, ()), token=token, code=None
    )
    with private.made_for(options.readable_by, planned.run.runs_dir, planned.run.path.parent):
        return submit.adopt(points.Batch(request=request, runs=(planned,)), _job_id(environment))


def _point(asked: sweep.Asked, task: int) -> sweep.Point:
    """The array task's point, counted among all: one that is left out must not shift the others.

    Raises:
        ConfigError: this point can't be.
        UsageError: the sweep has no such point.
    """
    for refused in asked.refused:
        if refused.number == task:
            raise ConfigError(dataclasses.replace(fault, where=refused.label) for fault in refused.faults)
    found = [point for point in asked.points if point.number == task]
    if not found:
        count = len(asked.points) + len(asked.refused)
        raise UsageError(f"the sweep has {count} points; there is none for array task {task}")
    return found[0]


def _with_the_jobs(overrides: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The overrides with the cluster that this job is on, and its nodes."""
    kind = [] if any(text.startswith("cluster=") for text in overrides) else ["cluster=slurm"]
    return [*kind, *overrides, f"cluster.nodes={environment.get('SLURM_JOB_NUM_NODES', '1')}"]


def _with_cpus(
    spec: ExperimentSpec, overrides: Sequence[str], environment: Mapping[str, str]
) -> ExperimentSpec:
    """The experiment with the job's CPUs shared evenly by a node's processes, unless the user said otherwise."""
    given = environment.get("SLURM_CPUS_PER_TASK")
    if given is None or any(text.startswith("cluster.cpus_per_process=") for text in overrides):
        return spec
    cpus = max(1, int(given) // spec.cluster.processes_per_node)
    return dataclasses.replace(spec, cluster=dataclasses.replace(spec.cluster, cpus_per_process=cpus))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
