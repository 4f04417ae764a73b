"""The first node is gone: what another node's agent does, where nobody else will.

The batch script and the supervisor of the job's steps are gone with the first node. Slurm queues the job again, but
only once it calls the node down (SlurmdTimeout, 300 s by default), and two minutes later; and with `--no-kill`
(cluster.min_nodes) never: it takes the node out of the job and keeps the others, on which nothing runs any more, until
the time limit (seen on 22.05). So the next node's agent sees to it that the run goes on in another job.

It does so only where it can't be mistaken for long: the state on the shared disk says that nobody has spoken, Slurm
answers (else this node is cut off itself), and the first node's slurmd doesn't.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hpcdl.launch import control, nodes
from hpcdl.launch.place import Place
from hpcdl.runs.state import RunState
from hpcdl.runs.store import RunDir

TURN_S = 15.0
"""How long the first node may take to say what follows; and then each node before this one."""
RESTART_S = 15.0
"""How long a first node that has said that it starts the run anew in place may take to do so. A longer time would
often be none: when Slurm calls the node down, it ends the job's step, this node's agent with it."""
_LOOK_S = 0.5


def must_speak(run: RunDir, place: Place, attempt: str, in_a_hurry: Callable[[], bool]) -> bool:
    """Waits until somebody has said what follows, or until it is this node's turn to.

    Args:
        run: the run.
        place: this node's part of the job; not the first.
        attempt: the try that has lost its first node.
        in_a_hurry: whether Slurm ends this agent's step: KillWait (30 s by default) is left.
    """
    began = time.monotonic()
    while _is_open(state := run.read_state(), place, attempt):
        wait_s = TURN_S * place.node + (RESTART_S if state.reason else 0.0)
        if in_a_hurry() or time.monotonic() - began >= wait_s:
            return _is_gone(place)
        time.sleep(_LOOK_S)
    return False


def let_the_job_end(run: RunDir, place: Place) -> None:
    """Ends this job once another one carries the run: nobody is left who would, and it holds its other nodes."""
    if place.job_id is not None and run.read_state().job_id != place.job_id:
        control.run(["scancel", place.job_id])


def _is_open(state: RunState, place: Place, attempt: str) -> bool:
    ours = (state.running_try, state.submission) == (attempt, place.token)
    return ours and state.state == "RUNNING"


def _is_gone(place: Place) -> bool:
    assert place.job_id is not None
    if control.ask(place.job_id, place.restarts).fate == "unknown":
        return False
    return bool(nodes.silent(place.nodes[:1]))
