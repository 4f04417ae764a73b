"""What follows once a try has ended on this node: the end, another try in place, or the queue again.

The first node's agent says it; where that one was killed, the supervisor of the job's steps (hpcdl.launch.steps).
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpcdl.launch import causes, control, ending, nodes, progress, requeue, survivor, torchrun
from hpcdl.launch.place import Place
from hpcdl.runs import fence, kinds, wish
from hpcdl.runs.state import ACTIVE, State
from hpcdl.runs.store import RunDir, now

_PEERS_LIMIT_S = 5.0
"""How long the first agent waits for the others' view of a failure: theirs may be the root cause."""
_STATE_LIMIT_S = 20.0
"""How long another agent waits with its non-zero end, upon which srun kills the first node's agent, until
that one has written why."""
_POLL_S = 0.1
_FINAL: frozenset[State] = frozenset({"COMPLETED", "CANCELLED"})
"""Ends that nobody wants to go on after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A failure that the first node's agent has looked at while torchrun was still there."""

    cause: causes.Cause
    failure: progress.Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What torchrun has left behind on this node."""

    code: int
    """Its exit code."""
    words: tuple[str, ...] = ()
    """The last lines that it said."""
    last: causes.LastLines = dataclasses.field(default_factory=dict)
    """The last lines of each rank here."""
    signals: tuple[int, ...] = ()
    """Signals that the agent got meanwhile, in their order."""
    killed: bool = False
    """Whether a second SIGINT made the agent kill the workers."""
    out_of_memory: bool = False
    """Whether the kernel killed a process of this node's part of the job for want of memory."""
    speechless: bool = False
    """Whether the first node's agent was itself killed: this is what its supervisor saw."""
    cause: causes.Cause | None = None
    """What ended the try, where it is known outright: a node or an agent was lost."""
    judged: Judged | None = None
    """What ended the try, where it was told before torchrun was ended."""
    lost: tuple[str, ...] = ()
    """Nodes of the job that can't be used any more."""
    told: bool = False
    """Whether another node's agent has told this one to end, or is lost itself (`cause`): no view of its own."""


class Closing:
    """The end of one try on one node.

    Args:
        run: the run's directory.
        place: which part of which job this is.
        attempt: the try.
        cluster: what the run may use of the cluster.
        say: tells the node's log and the job's output.
        reached: the last step of this try, after so many restarts in place (None: after the last one), where
            somebody knows it better than metrics.jsonl does.
    """

    def __init__(
        self,
        run: RunDir,
        place: Place,
        attempt: str,
        cluster: torchrun.NodeResources,
        say: Callable[[str], None],
        reached: Callable[[int | None], int] | None = None,
    ) -> None:
        self._run = run
        self._place = place
        self._attempt = attempt
        self._cluster = cluster
        self._say = say
        self.reached = reached or (lambda _: run.step())
        self.again: tuple[str, ...] = ()
        """Nodes that the next try in place runs on; none where there is no such try."""

    def first(self, left: Left) -> int:
        """On the first node: writes what follows; returns the agent's exit code.

        Raises:
            SupersededError: the run belongs to a newer try.
        """
        cause: list[causes.Cause] = []

        def root_cause() -> tuple[State, str]:
            told = left.cause or (left.judged.cause if left.judged else None)
            cause.append(told or self.cause(left))
            return "OUT_OF_MEMORY" if cause[0].out_of_memory else "FAILED", cause[0].reason

        seen = self._seen(left)
        end = ending.decide(seen, self._ask, root_cause)
        forget_signal(self._run)
        if end.requeued:
            return self._queued(end.reason, {}, requeue.BY_SLURM)
        if end.state in _FINAL:
            return self._finish(end, "")
        if cause:
            causes.decided(self._run, self._attempt, cause[0])
            failure = progress.of_cause(cause[0], progress.saved(self._run), self.reached(None))
            if left.judged is not None and left.cause is None:
                failure = left.judged.failure
        elif end.requeue:
            kind: kinds.Kind = "timeout" if end.state == "TIMEOUT" else "preempted"
            saved = seen.outcome.step if seen.outcome else progress.saved(self._run)
            step = saved if seen.outcome else max(saved, self.reached(None))
            failure = progress.Failure(kind=kind, step=step, saved=saved, reason=end.reason)
        else:
            return self._finish(end, "")
        return self._follow(end, failure, cause[0] if cause else None, left)

    def another(
        self, left: Left, tell: Callable[[bool], None], in_a_hurry: Callable[[], bool] = lambda: False
    ) -> int:
        """Another node's agent: leaves its view of a failure, and ends after the first node's has spoken.

        Args:
            left: what torchrun has left behind here.
            tell: tells the first node's agent whether this node's part has failed, once the view is there.
            in_a_hurry: whether Slurm has begun to end this agent.
        """
        if left.code == 0:
            tell(False)
            return 0
        if not left.told:
            own = left.cause or causes.from_torchrun(
                list(left.words), self._place.name, killed_by_kernel=left.out_of_memory, last=left.last
            )
            causes.record(self._run, self._attempt, self._place.node, own)
        tell(True)
        if self._place.kind == "kubernetes":
            return 1  # the first pod is made anew, and says what follows
        if left.told and left.cause is not None:
            return self._after_the_first(left, in_a_hurry)
        self._wait_for_the_first()
        return 1

    def _after_the_first(self, left: Left, in_a_hurry: Callable[[], bool]) -> int:
        """The first node is lost: what it would have said is said here, if nobody else does."""
        if not survivor.must_speak(self._run, self._place, self._attempt, in_a_hurry):
            return 1
        place = dataclasses.replace(self._place, again=None)
        end = Closing(self._run, place, self._attempt, self._cluster, self._say, self.reached)
        code = end.first(dataclasses.replace(left, speechless=True, lost=self._place.nodes[:1]))
        survivor.let_the_job_end(self._run, place)
        return code

    def cause(self, left: Left) -> causes.Cause:
        """The root cause, once the other nodes' agents have told theirs."""
        others = len(self._place.nodes) - 1
        deadline = time.monotonic() + _PEERS_LIMIT_S
        while causes.of_nodes(self._run, self._attempt) < others and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return causes.find(
            self._run,
            self._attempt,
            left.words,
            self._place.name,
            killed_by_kernel=left.out_of_memory,
            last=left.last,
        )

    def verdict(
        self,
        failure: progress.Failure,
        *,
        in_place: bool = True,
        is_lost: bool = False,
        spare: bool = False,
    ) -> progress.Verdict:
        """What the policy says to a failure of this try.

        Args:
            failure: how the try has ended.
            in_place: whether the job has time for another try.
            is_lost: whether its node is gone: Slurm itself then starts nothing there.
            spare: whether the job has nodes enough left without it.
        """
        events = self._run.events()
        limits = progress.Limits(
            max_restarts=self._cluster.max_restarts if in_place else 0,
            max_requeues=self._cluster.max_requeues if self._place.kind != "local" else 0,
            can_exclude=is_lost or self._cluster.exclude_failed_nodes,
            spare=spare,
        )
        state = self._run.read_state()
        return progress.verdict(progress.history(events, state.attempt), failure, limits)

    def _follow(
        self, end: ending.Ending, failure: progress.Failure, cause: causes.Cause | None, left: Left
    ) -> int:
        nodes_left = tuple(name for name in self._place.nodes if name not in left.lost)
        fewest = self._cluster.min_nodes or self._cluster.nodes
        decided = self.verdict(
            failure,
            in_place=self._place.again is not None and not self._asked_to_stop(left),
            is_lost=bool(left.lost),
            spare=bool(left.lost) and len(nodes_left) >= fewest,
        )
        more = progress.details(failure, decided)
        if decided.then == "restart" and len(nodes_left) >= fewest and nodes_left[0] == self._place.nodes[0]:
            return self._restart(end.reason, {**more, "nodes": list(nodes_left)}, nodes_left)
        if decided.then != "stop":
            if wish.of(self._run):  # made while the checkpoint was being saved
                reason = f"cancel; {end.reason}"
                return self._finish(
                    ending.Ending(state="CANCELLED", reason=reason, exit_code=ending.INTERRUPTED), ""
                )
            again = requeue.again(self._run, self._place, self._cluster.requeue, self._say)
            if not again.refused:
                code = self._queued(end.reason, {**more, **self._exclude(decided, again.job_id)}, again)
                if left.lost and again.changes:
                    self._start_at_once(again.job_id)
                return code
            decided = dataclasses.replace(
                decided, why=f"not requeued: {again.refused}", exit_code=failure.exit_code
            )
        end = dataclasses.replace(
            end, reason=f"{end.reason}; {decided.why}", exit_code=decided.exit_code or end.exit_code
        )
        return self._finish(end, cause.traceback if cause else "")

    def _asked_to_stop(self, left: Left) -> bool:
        """Whether somebody wants the job to end. SIGTERM is also what srun sends where another agent has ended."""
        from_srun = {signal.SIGTERM} if self._place.kind == "slurm" else set()
        return bool(set(left.signals) - from_srun)

    def _restart(self, reason: str, details: dict[str, Any], nodes_left: tuple[str, ...]) -> int:
        """The next try, in this job: the state stays RUNNING."""
        self.again = nodes_left
        self._update(
            event=(progress.RESTARTING, {**details, "in_place": progress.BY_THE_JOB, "try": self._attempt}),
            reason=f"restarts in place after: {reason}",
            restarts=self._run.read_state().restarts + 1,
        )
        self._say(f"{reason}; {details['why']}, on {', '.join(nodes_left)}")
        return 1

    def _queued(self, reason: str, details: dict[str, Any], again: requeue.Again) -> int:
        """The job is in the queue again, or its successor is."""
        requeues = count_requeues(self._run, self._attempt) + 1
        event = ("requeued", {**details, "reason": reason, "requeues": requeues, **again.details})
        changes = {"state": "PENDING", "reason": reason, "requeues": requeues, **again.changes}
        self._update(event=event, **changes)
        self._say(f"requeued: {reason}" if not again.changes else f"job {again.job_id} goes on: {reason}")
        return again.exit_code

    def _start_at_once(self, job_id: str) -> None:
        """A successor waits for this job's end, which a lost node keeps from coming."""
        refused = nodes.start_without_waiting(job_id)
        said = (
            f"still waits for the end of this job: {refused}"
            if refused
            else "need not wait for this job's end"
        )
        self._say(f"job {job_id} {said}")

    def _exclude(self, decided: progress.Verdict, job_id: str) -> dict[str, Any]:
        """Keeps the job that goes on off the nodes that are to blame; what the event says of it."""
        if not decided.exclude:
            return {}
        if self._place.kind == "kubernetes":
            return {
                "exclude": [],
                "not_excluded": "Kubernetes chooses the node: kubectl cordon keeps pods off one",
            }
        if not self._cluster.exclude_failed_nodes:
            return {"exclude": [], "not_excluded": "cluster.exclude_failed_nodes is false"}
        done = nodes.exclude(job_id, decided.exclude, self._cluster.nodes)
        return {
            "exclude": list(done.excluded),
            **({"not_excluded": done.refused} if done.refused else {}),
        }

    def _seen(self, left: Left) -> ending.Seen:
        return ending.Seen(
            kind=self._place.kind,
            code=left.code,
            outcome=ending.read_outcome(self._run.outcome_file, self._attempt),
            signals=tuple(signal.Signals(n).name.removeprefix("SIG") for n in left.signals),
            killed=left.killed,
            speechless=left.speechless,
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
        self._update(event=event, state=end.state, reason=end.reason, exit_code=end.exit_code, ended=now())
        if end.exit_code:
            self._say(f"{end.state}: {end.reason}\n{traceback}".rstrip())
        return end.exit_code or 0

    def _ask(self) -> control.JobFate:
        assert self._place.job_id is not None
        return control.ask(self._place.job_id, self._place.restarts)

    def _update(self, event: tuple[str, dict[str, Any]], **changes: Any) -> None:
        fence.update(self._run, self._attempt, self._place.token, event=event, **changes)

    def _wait_for_the_first(self) -> None:
        deadline = time.monotonic() + _STATE_LIMIT_S
        while self._first_is_silent() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _first_is_silent(self) -> bool:
        state = self._run.read_state()
        return state.state in ACTIVE and not state.reason


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
    highest: dict[int, int] = {}
    for attempt, number, *_ in (fence.number(text) for text in (*tries, current) if fence.number(text)):
        highest[attempt] = max(highest.get(attempt, 0), number)
    return sum(highest.values())
