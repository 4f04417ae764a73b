"""Slurm: one sbatch for an array of runs, rendered here and submitted by submitit.

Why a subclass of submitit's executor and not the executor itself: submitit carries a pickled function for
every task, runs it in one process a task, and requeues from inside its signal handler. Here

- a task carries a line number: the run directory's path stands in runs.txt and all state is in files, so that
  1,000 tasks cost one sbatch and no pickle (27 ms against 1.07 s), and a requeued job resumes from its disk;
- the script's text is rendered by a pure function, for the dry run to show the very bytes;
- the exit code of the job is srun's own: submitit's job ends with 0 after an exception;
- the agent waits for its child without submitit's handler on the main thread, which deadlocks on the same
  child's lock when a signal comes while it waits;
- the requeue is asked for by the first node only, by array id and task, as often as the run's own state says.

What stays submitit's: the submission itself (`_submit_command`), its reading of sbatch's answer, its errors.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from hpcdl.errors import SchedulerError
from hpcdl.launch import containers, control, lost, template, torchrun
from hpcdl.launch.base import JobRequest
from hpcdl.runs.scheduler import COMMENT
from hpcdl.runs.submissions import SBATCH_LIMIT_S

T = TypeVar("T")


def chunks(items: Sequence[T], max_array_size: int) -> tuple[tuple[T, ...], ...]:
    """Splits a sweep into arrays, each counted from 0: MaxArraySize bounds the index, not the number.

    Sizes differ by one at most, so that no array is a small rest.
    """
    count = -(-len(items) // max_array_size)
    size, rest = divmod(len(items), max(count, 1))
    cuts = [0]
    for number in range(count):
        cuts.append(cuts[-1] + size + (number < rest))
    return tuple(tuple(items[start:end]) for start, end in itertools.pairwise(cuts))


def throttles(parallelism: int, count: int) -> tuple[int, ...]:
    """Each array's share of the tasks that may run at a time; at least one each."""
    size, rest = divmod(parallelism, count)
    return tuple(max(1, size + (number < rest)) for number in range(count))


class SlurmBackend:
    """sbatch."""

    def render(self, request: JobRequest) -> str:
        """The whole script: header, this job's variables, setup and teardown lines, the template's body."""
        cluster = request.cluster
        inside = containers.program(request)
        srun_args = (*cluster.srun_args, *containers.srun_args(request))
        variables = [
            f"# Each node's agent starts: {torchrun.preview(cluster, inside[-1] if inside else request.python)}",
            f"HPCDL_PYTHON={shlex.quote(request.python)}",
            f"HPCDL_CODE={shlex.quote(str(request.code or ''))}",
            f"HPCDL_RUNS_FILE={shlex.quote(str(request.folder / 'runs.txt'))}",
            f"HPCDL_SRUN_ARGS=({' '.join(shlex.quote(a) for a in srun_args)})",
            *(template.array("HPCDL_INSIDE", inside) if inside else ()),
        ]
        lines = ["#!/bin/bash", *_header(request), "", *variables, *template.frame_arrays(cluster), ""]
        return "\n".join(lines) + "\n" + template.body()

    def submit(self, request: JobRequest, text: str) -> str | None:
        """Runs sbatch; returns the array's job id.

        Where the answer is lost, the job is looked for by its token before sbatch is run again.

        Raises:
            Unanswered: Slurm has not answered for as long as we wait; a job may have been made.
            SchedulerError: no sbatch here, or it refused; with its own words.
        """
        if shutil.which("sbatch") is None:
            raise SchedulerError(
                "sbatch is not on this machine, so nothing was submitted.\n"
                "fix: launch from a login node of the cluster, or run here with cluster=local"
            )
        request.folder.mkdir(parents=True, exist_ok=True)
        containers.make_caches(request)
        return lost.submit(request, lambda: _sbatch(text))


BACKEND = SlurmBackend()


def _header(request: JobRequest) -> list[str]:
    """The #SBATCH lines."""
    cluster = request.cluster
    last = len(request.run_dirs) - 1
    elastic = cluster.min_nodes is not None and cluster.min_nodes < cluster.nodes
    options: dict[str, Any] = {
        "job-name": request.name,
        "comment": COMMENT + request.token,
        "array": f"0-{last}%{min(cluster.array_parallelism, last + 1)}",
        "nodes": f"{cluster.min_nodes}-{cluster.nodes}" if elastic else cluster.nodes,
        # With it Slurm (22.05) takes the least number of a range of nodes, though more are idle; srun has it anyway.
        "ntasks-per-node": None if elastic else 1,
        "cpus-per-task": cluster.cpus_per_node,
        "mem": None if cluster.mem_gb is None else f"{round(cluster.mem_gb * 1024)}M",
        "time": cluster.time_min,
        "gpus-per-node": cluster.gpus_per_node if cluster.gpus_per_node and not cluster.gres else None,
        "gres": cluster.gres,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "reservation": cluster.reservation,
        "signal": cluster.signal,
        "dependency": ":".join(("afterok", *request.after_jobs)) if request.after_jobs else None,
        # Else a job whose predecessor has failed stays in the queue for ever.
        "kill-on-invalid-dep": "yes" if request.after_jobs else None,
        "output": str(request.folder).replace("%", "%%") + "/slurm-%A_%a.out",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={_word(str(value))}" for name, value in options.items() if value is not None]
    if elastic:  # else Slurm ends the job where it loses a node
        lines.append("#SBATCH --no-kill")
    return [*lines, "#SBATCH --requeue", *(f"#SBATCH {option}" for option in cluster.extra)]


def _word(value: str) -> str:
    """A value in an #SBATCH line, which sbatch reads by rules of its own: quotes as in a shell, but a backslash takes
    the next character's meaning away inside of single quotes, too.
    """
    return shlex.quote(value.replace("\\", "\\\\"))


def _sbatch(text: str) -> str:
    """One sbatch; returns the job id.

    Raises:
        LostAnswer: whether it got through is not known.
        SchedulerError: it was refused.
    """
    # Not in the submission's own folder: submitit replaces %j, %A, … in a folder's name, after the job was made.
    with tempfile.TemporaryDirectory(prefix="hpcdl-") as folder:
        try:
            executor = _executor_class()(folder)
            executor.text = text
            # submitit prints what sbatch says before it raises; we say it once, in words of ours.
            with contextlib.redirect_stderr(io.StringIO()):
                job = executor._submit_command("")
        except Exception as error:  # submitit has several kinds of errors for what sbatch says
            raise lost.told(error) from error
    return str(job.job_id)


def _executor_class() -> Any:
    """The subclass; built on demand, since importing submitit takes 0.1 s."""
    from submitit import SlurmExecutor

    class TextExecutor(SlurmExecutor):
        """Submits a given text instead of a pickled function."""

        text: str

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return self.text

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            unset = [word for name in control.job_variables(os.environ) for word in ("-u", name)]
            # An sbatch that hangs is ended. In a process group of its own: Ctrl-C is for the launcher, which
            # then finds out whether the job was made.
            limit = ["timeout", "--kill-after=5", str(SBATCH_LIMIT_S)]
            return [*(["env", *unset] if unset else []), *limit, "sbatch", str(submission_file_path)]

    return TextExecutor
