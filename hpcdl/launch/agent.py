"""One node's part of one try: starts torchrun, passes signals on, keeps state.json while the run goes on."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence

from hpcdl import secrets
from hpcdl.errors import HpcdlError, RunFailedError
from hpcdl.launch import causes, closing, memory, network, preflight, secret_file, torchrun
from hpcdl.launch.child import Log, Torchrun, started_at
from hpcdl.launch.place import Place
from hpcdl.runs.files import write_atomic
from hpcdl.runs.state import RunState
from hpcdl.runs.store import RunDir, now

_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
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
            secret_file.load(os.environ)
            preflight.check(self.run, self.place.name)
            cluster = torchrun.resources(self.run)
            left = self._torchrun(cluster)
        except (HpcdlError, OSError) as error:
            return self._broken(error)
        end = closing.Closing(self.run, self.place, self.attempt, cluster, self._say)
        return end.first(left) if self.place.first else end.another(left)

    def _started(self) -> None:
        """The first node's agent takes the state over."""
        closing.forget_signal(self.run)  # an earlier try's
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
            requeues=closing.count_requeues(self.run, self.attempt),
            exit_code=None,
            started=before.started or now(),
            ended=None,
        )

    def _torchrun(self, cluster: torchrun.NodeResources) -> closing.Left:
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
            code = self._child.watch(self._tick)
        finally:
            shutil.rmtree(log_dir, ignore_errors=True)
        if self.place.first and self._child.disturbed:
            self._next_look = 0.0
            self._look_for_restarts()
        return closing.Left(
            code=code,
            words=tuple(self._child.words),
            signals=tuple(self._signals),
            killed=self._killed,
            out_of_memory=self._memory_ran_out(),
        )

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

    def _memory_ran_out(self) -> bool:
        """Whether the kernel has killed a process of this node's part of the job since the agent started."""
        kills = memory.kills()
        return kills is not None and self._kills is not None and kills > self._kills

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

    def _say(self, text: str) -> None:
        """To this node's log, and to standard error: the Slurm output file."""
        text = secrets.hide(text)
        if self._log is not None:
            self._log.say(text)
        print(f"hpcdl: {self.place.name}: {text}", file=sys.stderr, flush=True)
