"""A worker has failed, and torchrun is about to start all workers anew: whether that may help.

torchrun only counts. The policy (hpcdl.launch.progress) looks at what failed: a fault of the config fails again,
so its torchrun is ended instead.
"""

from __future__ import annotations

import time

from hpcdl.launch import causes, closing, progress
from hpcdl.launch.child import Torchrun
from hpcdl.launch.closing import Closing
from hpcdl.launch.place import Place
from hpcdl.runs import fence
from hpcdl.runs.store import RunDir

_PEERS_S = 1.5
"""How long the first agent waits for what another node's ranks or agent have to say: it may be the cause of the
broken connection that its own have seen."""


class Judge:
    """Looks at each failure of a try in turn.

    Args:
        run: the run.
        place: which part of which job this is.
        attempt: the try.
        end: what decides.
        max_restarts: as torchrun was told: after so many failures it ends by itself.
    """

    def __init__(self, run: RunDir, place: Place, attempt: str, end: Closing, max_restarts: int) -> None:
        self._run = run
        self._place = place
        self._attempt = attempt
        self._end = end
        self._max_restarts = max_restarts
        self._recorded = 0
        self._judged = 0
        self._since = 0.0
        self.judged: closing.Judged | None = None
        """What was taken for no restart in place; what the ended workers say after it is its echo."""

    def look(self, child: Torchrun, *, killed_by_kernel: bool) -> str:
        """Why torchrun must be ended; empty where it may go on.

        Args:
            child: torchrun.
            killed_by_kernel: whether this node's kernel has killed a process of the job for want of memory.
        """
        failures = len(child.failures)
        while self._recorded < min(failures, self._max_restarts):
            one = child.failures[self._recorded]
            own = causes.of_exit(
                one.code,
                one.rank,
                self._place.name,
                one.time,
                killed_by_kernel=killed_by_kernel,
                last=child.last,
            )
            causes.record(self._run, self._attempt, self._place.node, own, restart=self._recorded, by="agent")
            self._recorded += 1
            self._since = time.monotonic()
        if not self._place.first or self._judged == self._recorded or self._may_hear_more():
            return ""
        self._judged = self._recorded
        return self._judgement(child, killed_by_kernel=killed_by_kernel)

    def _may_hear_more(self) -> bool:
        """Whether another node's agent or ranks may still have to say why."""
        if len(self._place.nodes) == 1 or time.monotonic() - self._since > _PEERS_S:
            return False
        number = self._recorded - 1
        said = self._run.errors.glob(f"try{self._attempt}-restart{number}-agent-node*.json")
        return sum(1 for _ in said) < len(self._place.nodes)

    def _judgement(self, child: Torchrun, *, killed_by_kernel: bool) -> str:
        cause = causes.find(
            self._run,
            self._attempt,
            child.words,
            self._place.name,
            killed_by_kernel=killed_by_kernel,
            last=child.last,
        )
        causes.decided(self._run, self._attempt, cause, self._recorded - 1)
        failure = progress.of_cause(cause, progress.saved(self._run), self._end.reached(self._recorded - 1))
        decided = self._end.verdict(failure)
        if decided.then != "restart":
            self.judged = closing.Judged(cause=cause, failure=failure)
            return f"{cause.reason}; {decided.why}"
        details = {
            **progress.details(failure, decided),
            "in_place": progress.BY_TORCHRUN,
            "try": self._attempt,
        }
        restarts = self._run.read_state().restarts + 1
        fence.update(
            self._run,
            self._attempt,
            self._place.token,
            event=(progress.RESTARTING, details),
            restarts=restarts,
        )
        return ""
