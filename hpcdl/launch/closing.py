"""What an agent does once torchrun has ended on its node: the final state, or its view of a failure."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpcdl.launch import causes, control, ending, torchrun
from hpcdl.launch.place import Place
from hpcdl.runs.state import ACTIVE, State
from hpcdl.runs.store import RunDir, now

_PEERS_LIMIT_S = 5.0
"""How long the first agent waits for the others' view of a failure: theirs may be the root cause."""
_STATE_LIMIT_S = 20.0
"""How long another agent waits with its non-zero end, upon which srun kills the first node's agent, until
that one has written why."""
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What torchrun has left behind on this node."""

    code: int
    """Its exit code."""
    words: tuple[str, ...] = ()
    """The last lines that it said."""
    signals: tuple[int, ...] = ()
    """Signals that the agent got meanwhile, in their order."""
    killed: bool = False
    """Whether a second SIGINT made the agent kill the workers."""
    out_of_memory: bool = False
    """Whether the kernel killed a process of this node's part of the job for want of memory."""


class Closing:
    """The end of one try on one node.

    Args:
        run: the run's directory.
        place: which part of which job this is.
        attempt: the try.
        cluster: what the run may use of the cluster.
        say: tells the node's log and the job's output.
    """

    def __init__(
        self,
        run: RunDir,
        place: Place,
        attempt: str,
        cluster: torchrun.NodeResources,
        say: Callable[[str], None],
    ) -> None:
        self._run = run
        self._place = place
        self._attempt = attempt
        self._cluster = cluster
        self._say = say

    def first(self, left: Left) -> int:
        """The first node's agent: writes what follows; returns the agent's exit code."""
        cause: list[causes.Cause] = []

        def root_cause() -> tuple[State, str]:
            cause.append(self._cause(left))
            return "OUT_OF_MEMORY" if cause[0].out_of_memory else "FAILED", cause[0].reason

        end = ending.decide(self._seen(left), self._ask, root_cause)
        forget_signal(self._run)
        if end.requeue:
            end = self._requeue(end)
        if end.requeued:
            requeues = count_requeues(self._run, self._attempt) + 1
            event = ("requeued", {"reason": end.reason, "requeues": requeues})
            self._run.update(event=event, state="PENDING", reason=end.reason, requeues=requeues)
            return 0
        return self._finish(end, cause[0].traceback if cause else "")

    def another(self, left: Left) -> int:
        """Another node's agent: leaves its view of a failure, and ends after the first node's has spoken."""
        if left.code == 0:
            return 0
        own = causes.from_torchrun(list(left.words), self._place.name, killed_by_kernel=left.out_of_memory)
        causes.record(self._run, self._attempt, self._place.node, own)
        self._wait_for_the_first()
        return 1

    def _seen(self, left: Left) -> ending.Seen:
        return ending.Seen(
            kind=self._place.kind,
            code=left.code,
            outcome=ending.read_outcome(self._run.outcome_file, self._attempt),
            signals=tuple(signal.Signals(n).name.removeprefix("SIG") for n in left.signals),
            killed=left.killed,
            requeues_left=self._cluster.max_requeues - self._place.requeue,
        )

    def _finish(self, end: ending.Ending, traceback: str) -> int:
        step = self._run.step()
        event: tuple[str, dict[str, Any]]
        if end.state == "COMPLETED":
            event = ("finished", {"step": step})
        elif end.state == "CANCELLED":
            event = ("cancelled", {"by": end.reason.split(";")[0], "step": step})
        else:
            event = ("failed", {"reason": end.reason, "traceback": traceback})
        self._run.update(
            event=event, state=end.state, reason=end.reason, exit_code=end.exit_code, ended=now()
        )
        if end.exit_code:
            self._say(f"{end.state}: {end.reason}\n{traceback}".rstrip())
        return end.exit_code or 0

    def _requeue(self, end: ending.Ending) -> ending.Ending:
        assert self._place.job_id is not None
        refused = control.requeue(self._place.job_id)
        if not refused:
            return dataclasses.replace(end, state="PENDING", requeued=True)
        return dataclasses.replace(end, reason=f"{end.reason}; not requeued: {refused}")

    def _ask(self) -> control.JobFate:
        assert self._place.job_id is not None
        return control.ask(self._place.job_id, self._place.requeue)

    def _cause(self, left: Left) -> causes.Cause:
        others = len(self._place.nodes) - 1
        deadline = time.monotonic() + _PEERS_LIMIT_S
        while causes.of_nodes(self._run, self._attempt) < others and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return causes.find(
            self._run, self._attempt, left.words, self._place.name, killed_by_kernel=left.out_of_memory
        )

    def _wait_for_the_first(self) -> None:
        deadline = time.monotonic() + _STATE_LIMIT_S
        while self._run.read_state().state in ACTIVE and time.monotonic() < deadline:
            time.sleep(_POLL_S)


def forget_signal(run: RunDir) -> None:
    """Removes a STOP file that tells of a signal: it is over with the try. One of a user's stays."""
    with contextlib.suppress(FileNotFoundError):
        if run.stop_file.read_text(encoding="utf-8").startswith("SIG"):
            run.stop_file.unlink()


def count_requeues(run: RunDir, current: str) -> int:
    """Times that the scheduler has started the run's jobs anew, from its `started` events and this try.

    Counted there and not in the agent that asks for the requeue: Slurm also requeues by itself.

    Args:
        run: the run.
        current: this try.
    """
    tries = [str(e.get("try", "")) for e in run.events() if e.get("event") == "started"]
    highest: dict[str, int] = {}
    for attempt, _, requeue in (text.partition(".") for text in (*tries, current)):
        if requeue.isdigit():
            highest[attempt] = max(highest.get(attempt, 0), int(requeue))
    return sum(highest.values())
