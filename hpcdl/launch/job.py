"""The agent: `python -m hpcdl.launch.job RUNS_FILE [INDEX]`, once on each node of a job.

It reads spec.yaml, starts torchrun, writes its output to `logs/<node>-try<try>.log`, and ends as the run
does. The first node's agent owns state.json while the job runs. It starts quickly: standard library, yaml
and the run store.

Killed with -9, or a node lost, at any moment:
    what dies          what is left, and who says so
    a worker           torchrun ends the others, the agent writes FAILED with the signal's name
    torchrun           its workers die with it or are killed by the agent, which writes FAILED
    an agent           torchrun and the workers die with it (PR_SET_PDEATHSIG); srun ends the other nodes'. If
                       it was the first node's, state.json says RUNNING with its pid and job id, and the next
                       poll (hpcdl.runs.reconcile) finds the process or the job gone
    the whole node     the same; Slurm queues the job again, and the next try resumes from the last checkpoint
state.json itself is replaced by rename: it holds the old state or the new one.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hpcdl.errors import HpcdlError, UsageError
from hpcdl.launch import begin, frozen, torchrun
from hpcdl.launch.agent import Agent
from hpcdl.launch.place import find
from hpcdl.runs import chain, fence, private
from hpcdl.runs.kinds import NEVER_RESTART
from hpcdl.runs.state import ACTIVE
from hpcdl.runs.store import RunDir


def main(argv: Sequence[str], worker: Sequence[str] = torchrun.WORKER) -> int:
    """Finds the run and its place, and runs this node's part; returns the exit code.

    Args:
        argv: RUNS_FILE and, outside of an array, the line of it.
        worker: what torchrun starts on each rank.
    """
    try:
        if len(argv) not in (1, 2):
            raise UsageError("usage: python -m hpcdl.launch.job RUNS_FILE [INDEX]")
        frozen.require(os.environ)
        runs_file = Path(argv[0])
        place = find(runs_file, int(argv[1]) if len(argv) == 2 else None, os.environ)
        private.require_mine(runs_file.parent)
        run = RunDir(run_path(runs_file, place.index))
        private.require_mine(run.path)
        private.take_over(run.path)
        state = run.read_state()
    except (HpcdlError, OSError) as error:
        print(f"hpcdl: {os.uname().nodename}: {error}", file=sys.stderr, flush=True)
        return error.exit_code if isinstance(error, HpcdlError) else 1
    if not chain.owns(run, state, place.token, place.index):
        print(f"hpcdl: {run.path} has been launched again since: this job has nothing to do", file=sys.stderr)
        return 1
    if state.state == "COMPLETED":
        return 0
    if state.exit_code == NEVER_RESTART and state.state not in ACTIVE:
        # Somebody has put the job back (scontrol requeue, a site's RequeueExit): a new launch is another try.
        print(f"hpcdl: {run.path} is not tried again: {state.reason}; hpcdl launch it anew", file=sys.stderr)
        return NEVER_RESTART
    code = begin.nothing_to_do(run, place)
    if code is not None:
        return code
    if fence.number(state.running_try) > fence.number(place.attempt(state.attempt)):
        print(f"hpcdl: {run.path} is at try {state.running_try} already: nothing to do", file=sys.stderr)
        return 1
    agent = Agent(run, place, state, worker)
    code = agent.main()
    while agent.again and place.kind == "local":  # under Slurm hpcdl.launch.steps does it, on all nodes
        place = dataclasses.replace(place, again=(place.again or 0) + 1)
        agent = Agent(run, place, run.read_state(), worker, agent.unheard)
        code = agent.main()
    return code


def run_path(runs_file: Path, index: int) -> Path:
    # Not splitlines(): some characters that a path may hold end a line for it.
    """The run directory that a submission's task carries.

    Raises:
        UsageError: it has no such task.
    """
    lines = runs_file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if not 0 <= index < len(lines):
        raise UsageError(f"{runs_file} has {len(lines)} runs; there is no number {index}")
    return Path(lines[index])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
