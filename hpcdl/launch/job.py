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

import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hpcdl.errors import HpcdlError, RunFailedError, UsageError
from hpcdl.launch import causes, control, ending, memory, network, preflight, torchrun
from hpcdl.launch.child import Log, Torchrun, started_at
from hpcdl.launch.place import Place, find
from hpcdl.runs.files import write_atomic
from hpcdl.runs.state import ACTIVE, RunState, State
from hpcdl.runs.store import RunDir, now

_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
_PEERS_LIMIT_S = 5.0
"""How long the first agent waits for the others' view of a failure: theirs may be the root cause."""
_STATE_LIMIT_S = 20.0
"""How long another agent waits with its non-zero end, upon which srun kills the first node's agent, until
that one has written why."""
_POLL_S = 0.1
_LOOK_S = 1.0


class Agent:
    """One node's part of one try.

    Args:
        run: the run's directory.
        place: which part of which job this is.
        state: the run's state as it was found.
        worker: what torchrun starts on each rank; the run directory follows.
    """

    def __init__(self, run: RunDir, place: Place, state: RunState, worker: Sequence[str]) -> None:
        self.run = run
        self.place = place
        self.attempt = f"{state.attempt}.{place.requeue}"
        self._worker = (*worker, str(run.path))
        self._restarts_known = state.restarts
        self._next_look = 0.0
        self._signals: list[int] = []
        self._acted = 0
        self._killed = False
        self._kills = memory.kills()
        self._child: Torchrun | None = None
        self._log: Log | None = None

    def main(self) -> int:
        """Runs the try; returns the agent's exit code."""
        for number in _SIGNALS:
            signal.signal(number, lambda n, _: self._signals.append(n))
        try:
            preflight.check(self.run, self.place.name)
            code = self._torchrun()
        except (HpcdlError, OSError) as error:
            return self._broken(error)
        return self._ended(code) if self.place.first else self._ended_elsewhere(code)

    def _started(self) -> None:
        """The first node's agent takes the state over."""
        self._forget_signal()  # an earlier try's
        place = self.place
        started = {
            "try": self.attempt,
            "nodes": len(place.nodes),
            "node_list": list(place.nodes),
            "job_id": place.job_id,
        }
        before = self.run.read_state()
        self.run.update(
            event=("started", started),
            state="RUNNING",
            reason="",
            job_id=place.job_id,
            node_list=place.nodes,
            host=os.uname().nodename,
            agent_pid=os.getpid(),
            agent_started=started_at(os.getpid()),
            requeues=_requeues(self.run, self.attempt),
            exit_code=None,
            started=before.started or now(),
            ended=None,
        )

    def _torchrun(self) -> int:
        cluster = _resources(self.run)
        if len(self.place.nodes) != cluster.nodes:
            raise RunFailedError(f"the run wants {cluster.nodes} nodes, the job has {len(self.place.nodes)}")
        meeting = self._rendezvous()
        environment = torchrun.environment(cluster, self.attempt, os.environ)
        if len(self.place.nodes) > 1:
            environment.update(network.gloo_settings(meeting.local_address, environment))
        log_dir = tempfile.mkdtemp(prefix="hpcdl-torchrun-")
        argv = torchrun.command(cluster, sys.executable, meeting, log_dir, self._worker)
        self._log = Log(self.run.logs / f"{self.place.name}-try{self.attempt}.log")
        self._log.say(f"try {self.attempt} on {self.place.name}, job {self.place.job_id or 'local'}")
        try:
            self._child = Torchrun(argv, environment, self._log)
            if self.place.first:
                self._started()  # only now: torchrun imports torch meanwhile, which takes seconds
            return self._child.watch(self._tick)
        finally:
            shutil.rmtree(log_dir, ignore_errors=True)

    def _rendezvous(self) -> torchrun.Rendezvous:
        place = self.place
        if place.head is None:
            return torchrun.alone(place.rendezvous_id)
        address = network.local_address(place.head, place.port)
        if place.first:
            network.check_port(place.head, place.port)
        return torchrun.Rendezvous(
            id=place.rendezvous_id,
            host=place.head,
            port=place.port,
            is_head=place.first,
            local_address=address,
        )

    def _look_for_restarts(self) -> None:
        """After a disturbance: rank 0 says by an event that the workers have been started anew in place."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_S
        restarts = sum(event.get("event") == "restarted" for event in self.run.events())
        if restarts != self._restarts_known:
            self._restarts_known = restarts
            self.run.update(restarts=restarts)

    def _tick(self) -> None:
        """Acts on signals: never inside the handler, which may interrupt anything."""
        assert self._child is not None
        while self._acted < len(self._signals):
            self._acted += 1
            self._act(self._signals[self._acted - 1])
        if self.place.first and self._child.disturbed:
            self._look_for_restarts()
        if self._signals and self.place.first and len(self.place.nodes) > 1:
            # Told to end because another node's agent could not start: nobody will come to the rendezvous.
            broken = causes.of_nodes(self.run, self.attempt)
            if broken and not any(self.run.errors.glob(f"try{self.attempt}-*-rank*.json")):
                self._child.kill()

    def _act(self, number: int) -> None:
        assert self._child is not None
        name = signal.Signals(number).name
        if self._log is not None:
            self._log.say(f"got {name}")
        if self._signals[: self._acted].count(signal.SIGINT) > 1:
            self._killed = True
            self._child.kill()
            return
        if self.place.kind == "local" and self._acted == 1:
            # Under Slurm the workers got it themselves: signals go to every process of the step. Once only:
            # a second one would kill a Python that has saved its checkpoint and is on its way out.
            self._child.signal_workers(signal.SIGUSR2)
        if self.place.first and not self.run.stop_file.exists():
            # For workers that are still importing, with the signal ignored: they look here at each step.
            write_atomic(self.run.stop_file, f"{name}\n")

    def _seen(self, code: int) -> ending.Seen:
        return ending.Seen(
            kind=self.place.kind,
            code=code,
            outcome=ending.read_outcome(self.run.outcome_file, self.attempt),
            signals=tuple(signal.Signals(n).name.removeprefix("SIG") for n in self._signals),
            killed=self._killed,
            requeues_left=_resources(self.run).max_requeues - self.place.requeue,
        )

    def _ended(self, code: int) -> int:
        """The first node's agent: the final state."""
        cause: list[causes.Cause] = []

        def root_cause() -> tuple[State, str]:
            cause.append(self._cause())
            return "OUT_OF_MEMORY" if cause[0].out_of_memory else "FAILED", cause[0].reason

        if self._child is not None and self._child.disturbed:
            self._next_look = 0.0
            self._look_for_restarts()
        end = ending.decide(self._seen(code), self._ask, root_cause)
        self._forget_signal()
        if end.requeue:
            end = self._requeue(end)
        if end.requeued:
            requeues = _requeues(self.run, self.attempt) + 1
            event = ("requeued", {"reason": end.reason, "requeues": requeues})
            self.run.update(event=event, state="PENDING", reason=end.reason, requeues=requeues)
            return 0
        return self._finish(end, cause[0].traceback if cause else "")

    def _finish(self, end: ending.Ending, traceback: str = "") -> int:
        step = self.run.step()
        event: tuple[str, dict[str, Any]]
        if end.state == "COMPLETED":
            event = ("finished", {"step": step})
        elif end.state == "CANCELLED":
            event = ("cancelled", {"by": end.reason.split(";")[0], "step": step})
        else:
            event = ("failed", {"reason": end.reason, "traceback": traceback})
        self.run.update(event=event, state=end.state, reason=end.reason, exit_code=end.exit_code, ended=now())
        if end.exit_code:
            self._say(f"{end.state}: {end.reason}\n{traceback}".rstrip())
        return end.exit_code or 0

    def _requeue(self, end: ending.Ending) -> ending.Ending:
        assert self.place.job_id is not None
        refused = control.requeue(self.place.job_id)
        if not refused:
            return dataclasses.replace(end, state="PENDING", requeued=True)
        return dataclasses.replace(end, reason=f"{end.reason}; not requeued: {refused}")

    def _ask(self) -> control.JobFate:
        assert self.place.job_id is not None
        return control.ask(self.place.job_id, self.place.requeue)

    def _cause(self) -> causes.Cause:
        others = len(self.place.nodes) - 1
        deadline = time.monotonic() + _PEERS_LIMIT_S
        while causes.of_nodes(self.run, self.attempt) < others and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        words = self._child.words if self._child else ()
        return causes.find(
            self.run, self.attempt, words, self.place.name, killed_by_kernel=self._memory_ran_out()
        )

    def _memory_ran_out(self) -> bool:
        """Whether the kernel has killed a process of this node's part of the job since the agent started."""
        kills = memory.kills()
        return kills is not None and self._kills is not None and kills > self._kills

    def _ended_elsewhere(self, code: int) -> int:
        """Another node's agent: leaves its view of a failure, and ends after the first node's has spoken."""
        if code == 0:
            return 0
        assert self._child is not None
        own = causes.from_torchrun(
            list(self._child.words), self.place.name, killed_by_kernel=self._memory_ran_out()
        )
        causes.record(self.run, self.attempt, self.place.node, own)
        self._wait_for_the_first()
        return 1

    def _wait_for_the_first(self) -> None:
        deadline = time.monotonic() + _STATE_LIMIT_S
        while self.run.read_state().state in ACTIVE and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _broken(self, error: Exception) -> int:
        """Torchrun could not even be started here."""
        cause = causes.Cause(time=now(), type=type(error).__name__, message=str(error), node=self.place.name)
        self._say(cause.reason)
        with contextlib.suppress(OSError):  # the run directory may be what is broken
            if self.place.first:
                if self._child is None:
                    self._started()
                event = ("failed", {"reason": cause.reason, "traceback": ""})
                self.run.update(event=event, state="FAILED", reason=cause.reason, exit_code=1, ended=now())
            else:
                causes.record(self.run, self.attempt, self.place.node, cause)
        return 1

    def _forget_signal(self) -> None:
        """Removes a STOP file that tells of a signal: it is over with the try. One of a user's stays."""
        with contextlib.suppress(FileNotFoundError):
            if self.run.stop_file.read_text(encoding="utf-8").startswith("SIG"):
                self.run.stop_file.unlink()

    def _say(self, text: str) -> None:
        """To this node's log, and to standard error: the Slurm output file."""
        if self._log is not None:
            self._log.say(text)
        print(f"hpcdl: {self.place.name}: {text}", file=sys.stderr, flush=True)


def _resources(run: RunDir) -> torchrun.NodeResources:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    plain = yaml.load(run.spec_file.read_text(encoding="utf-8"), Loader=loader)
    return torchrun.NodeResources.of(plain["cluster"])


def _requeues(run: RunDir, current: str) -> int:
    """Times that the scheduler has started the run's jobs anew, from its `started` events and this try.

    Counted there and not in the agent that asks for the requeue: Slurm also requeues by itself.
    """
    tries = [str(e.get("try", "")) for e in run.events() if e.get("event") == "started"]
    highest: dict[str, int] = {}
    for attempt, _, requeue in (text.partition(".") for text in (*tries, current)):
        if requeue.isdigit():
            highest[attempt] = max(highest.get(attempt, 0), int(requeue))
    return sum(highest.values())


def main(argv: Sequence[str], worker: Sequence[str] = torchrun.WORKER) -> int:
    """Finds the run and its place, and runs this node's part; returns the exit code.

    Args:
        argv: RUNS_FILE and, outside of an array, the line of it.
        worker: what torchrun starts on each rank.
    """
    try:
        if len(argv) not in (1, 2):
            raise UsageError("usage: python -m hpcdl.launch.job RUNS_FILE [INDEX]")
        runs_file = Path(argv[0])
        place = find(runs_file, int(argv[1]) if len(argv) == 2 else None, os.environ)
        run = RunDir(_run_path(runs_file, place.index))
        state = run.read_state()
    except (HpcdlError, OSError) as error:
        print(f"hpcdl: {os.uname().nodename}: {error}", file=sys.stderr, flush=True)
        return error.exit_code if isinstance(error, HpcdlError) else 1
    if state.submission != place.token or state.array_index != place.index:
        print(f"hpcdl: {run.path} has been launched again since: this job has nothing to do", file=sys.stderr)
        return 1
    if state.state == "COMPLETED":
        return 0
    return Agent(run, place, state, worker).main()


def _run_path(runs_file: Path, index: int) -> Path:
    lines = runs_file.read_text(encoding="utf-8").splitlines()
    if not 0 <= index < len(lines):
        raise UsageError(f"{runs_file} has {len(lines)} runs; there is no number {index}")
    return Path(lines[index])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
