"""One node's part of one try: starts torchrun, passes signals on, keeps state.json while the run goes on."""

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

from hpcdl import secrets
from hpcdl.errors import HpcdlError, RunFailedError, SupersededError
from hpcdl.launch import before as before_this
from hpcdl.launch import (
    causes,
    closing,
    hang,
    judging,
    memory,
    network,
    peers,
    preflight,
    scratch,
    secret_file,
    strays,
    torchrun,
)
from hpcdl.launch.child import Log, Torchrun, started_at
from hpcdl.launch.place import Place
from hpcdl.runs import fence
from hpcdl.runs.files import write_atomic
from hpcdl.runs.state import RunState
from hpcdl.runs.store import RunDir, now

_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
_LOOK_S = 1.0
"""Between two looks at the shared disk."""


class Agent:
    """One node's part of one try.

    Args:
        run: the run's directory.
        place: which part of which job this is.
        state: the run's state as it was found.
        worker: what torchrun starts on each rank; the run directory follows.
        signals: those that came before this try began.
    """

    def __init__(
        self,
        run: RunDir,
        place: Place,
        state: RunState,
        worker: Sequence[str],
        signals: Sequence[int] = (),
    ) -> None:
        self.run = run
        self.place = place
        self.attempt = place.attempt(state.attempt)
        self._worker = (*worker, str(run.path))
        self.again: tuple[str, ...] = ()
        """Nodes of the next try in place, once this one has ended; none where there is no such try."""
        self._next_look = 0.0
        self._signals: list[int] = list(signals)
        self._acted = 0
        self._killed = False
        self._kills = memory.kills()
        self._child: Torchrun | None = None
        self._log: Log | None = None
        self._peers: peers.Peers | None = None
        self._judge: judging.Judge | None = None
        self._guard: hang.Guard | None = None
        self._measured: dict[str, object] = {}
        self._over: peers.Over | None = None
        self._ended_here = False
        self._superseded = ""

    @property
    def signals(self) -> tuple[int, ...]:
        """All that came, those before this try included."""
        return tuple(self._signals)

    @property
    def unheard(self) -> tuple[int, ...]:
        """Signals that came too late to be acted on."""
        return tuple(self._signals[self._acted :])

    def main(self) -> int:
        """Runs the try; returns the agent's exit code."""
        for number in _SIGNALS:
            signal.signal(number, lambda n, _: self._signals.append(n))
        end = None
        try:
            secret_file.load(os.environ)
            preflight.readable(self.run, self.place.name)
            cluster = torchrun.resources(self.run)
            end = closing.Closing(self.run, self.place, self.attempt, cluster, self._say, self._reached)
            if self.place.first and self.place.kind != "local":
                by = "Slurm" if self.place.kind == "slurm" else "Kubernetes"
                before_this.tell(self.run, self.attempt, cluster.max_requeues, by)
            self._preflight()
            self._judge = judging.Judge(self.run, self.place, self.attempt, end, cluster.max_restarts)
            left = self._torchrun(cluster)
            code = (
                end.first(left)
                if self.place.first
                else end.another(left, self._leave, lambda: signal.SIGTERM in self._signals)
            )
        except SupersededError as error:
            self._say(str(error))
            self._leave(failed=False)
            return 1
        except (HpcdlError, OSError) as error:
            code = self._broken(error, end)
        self.again = end.again if end is not None else ()
        return code

    def _reached(self, restart: int | None = None) -> int:
        """The last step of this try: its ranks' own word, else the last one that was logged."""
        step = self._guard.watch.step(restart) if self._guard is not None else None
        return self.run.step() if step is None else step

    def _preflight(self) -> None:
        """Looks at this node; what is only a warning is told, what is a fault is raised."""
        name = self.place.name
        report = preflight.check(self.run, name, in_a_hurry=lambda: bool(self._signals))
        for warning in report.warnings:
            self._say(f"preflight: {warning}")
            self.run.event("warning", message=f"preflight on node {name}: {warning}")
        self._measured = report.measured

    def _started(self, cluster: torchrun.NodeResources | None) -> None:
        """The first node's agent takes the state over."""
        closing.forget_signal(self.run)  # an earlier try's
        place = self.place
        started = {
            "try": self.attempt,
            "nodes": len(place.nodes),
            "node_list": list(place.nodes),
            "job_id": place.job_id,
            "preflight": self._measured,
        }
        before = self.run.read_state()
        fence.update(
            self.run,
            self.attempt,
            None,
            event=("started", started),
            running_try=self.attempt,
            state="RUNNING",
            reason="",
            job_id=place.job_id,
            submission=place.token,  # a successor's own, where the job before it could not hand the run over
            array_index=place.index,
            node_list=place.nodes,
            host=os.uname().nodename,
            agent_pid=os.getpid(),
            agent_started=started_at(os.getpid()),
            requeues=closing.count_requeues(self.run, self.attempt),
            exit_code=None,
            started=before.started or now(),
            ended=None,
            nodes=len(place.nodes) if cluster else before.nodes,
            world_size=len(place.nodes) * cluster.processes_per_node if cluster else before.world_size,
        )

    def _torchrun(self, cluster: torchrun.NodeResources) -> closing.Left:
        count, fewest = len(self.place.nodes), cluster.min_nodes or cluster.nodes
        if not fewest <= count <= cluster.nodes:
            wanted = f"{cluster.nodes}" if fewest == cluster.nodes else f"{fewest} to {cluster.nodes}"
            raise RunFailedError(f"the run wants {wanted} nodes, the job has {count}")
        cluster = dataclasses.replace(cluster, nodes=count)
        meeting = self._rendezvous()
        environment = torchrun.environment(cluster, self.attempt, os.environ)
        if count > 1:
            environment.update(network.gloo_settings(meeting.local_address, environment))
            self._peers = peers.Peers(self.place, self.attempt, cluster.lost_after_s)
        log_dir = tempfile.mkdtemp(prefix="hpcdl-torchrun-")
        self._guard = hang.Guard(self.run, self.place, self.attempt, Path(log_dir))
        environment |= {**self._guard.environment, strays.AGENT: strays.name_of_this_agent()}
        environment |= scratch.caches(environment)
        argv = torchrun.command(cluster, sys.executable, meeting, log_dir, self._worker)
        copy = sys.stdout.fileno() if self.place.kind == "kubernetes" else None  # what kubectl logs shows
        self._log = Log(self.run.logs / f"{self.place.name}-try{self.attempt}.log", copy)
        self._log.say(f"try {self.attempt} on {self.place.name}, job {self.place.job_id or 'local'}")
        try:
            self._child = Torchrun(argv, environment, self._log)
            # Only now: torchrun imports torch meanwhile, which takes seconds.
            from hpcdl.monitor import sampler, watching
            from hpcdl.monitor.processes import Processes

            spec, signs = torchrun.plain_spec(self.run), Path(log_dir)
            leaks = watching.Watcher(
                watching.Settings.of(spec), self.run, self.place.name, self.attempt, signs, self._log_line
            )
            with sampler.Sampler(
                sampler.Settings.of(spec),
                self.run,
                node=self.place.name,
                attempt=self.attempt,
                processes=Processes(self._child.pid, signs=signs),
                listeners=(leaks.take,),
            ):
                if self.place.first:
                    self._started(cluster)
                code = self._child.watch(self._tick)
            leaks.close()
        finally:
            self._reached()
            shutil.rmtree(log_dir, ignore_errors=True)
            if self._child is not None:
                self._child.kill()
            if self._peers is not None and self.place.first:
                self._peers.leave(end=self._ended_here)
        if self._superseded:
            raise SupersededError(self._superseded)
        self._judge_failures()
        return closing.Left(
            code=code,
            words=tuple(self._child.words),
            last=self._child.last,
            signals=tuple(self._signals),
            killed=self._killed,
            out_of_memory=self._memory_ran_out(),
            cause=self._over.cause if self._over else self._torchrun_killed(code),
            judged=self._judge.judged if self._judge else None,
            lost=self._over.lost if self._over else (),
            told=self._over is not None,
        )

    def _torchrun_killed(self, code: int) -> causes.Cause | None:
        by_guard = self._guard is not None and self._guard.has_ended_torchrun
        if code >= 0 or self._ended_here or self._killed or by_guard:
            return None
        name = signal.Signals(-code).name
        return causes.Cause(
            time=now(), type=name, message="torchrun was killed", node=self.place.name, signal=-code
        )

    def _leave(self, failed: bool) -> None:
        if self._peers is not None:
            self._peers.leave(failed=failed)

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

    def _tick(self) -> None:
        """Acts on signals: never inside the handler, which may interrupt anything."""
        assert self._child is not None
        while self._acted < len(self._signals):
            self._acted += 1
            self._act(self._signals[self._acted - 1])
        assert self._guard is not None
        self._guard.look(self._child, self._log_line)
        self._judge_failures()
        self._look_at_peers()
        if self._signals and self.place.first and len(self.place.nodes) > 1:
            # Told to end because another node's agent could not start: nobody will come to the rendezvous.
            broken = causes.of_nodes(self.run, self.attempt)
            if broken and not any(self.run.errors.glob(f"try{self.attempt}-*-rank*.json")):
                self._end()
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_S
            self._look_at_fence()

    def _judge_failures(self) -> None:
        """A worker has failed, and torchrun would start all of them anew."""
        assert self._child is not None and self._judge is not None
        why = self._judge.look(self._child, killed_by_kernel=self._memory_ran_out())
        if not why and self._signals and self._child.failures:
            why = "a worker has failed on its way out"
        if why and not self._ended_here:
            self._log_line(f"no restart in place: {why}")
            self._end()

    def _look_at_peers(self) -> None:
        if self._peers is None or self._over is not None:
            return
        for name in self._peers.news():
            self._log_line(f"hears node {name}")
        self._over = self._peers.look()
        if self._over is not None:
            self._log_line(self._over.words)
            self._end()

    def _look_at_fence(self) -> None:
        newer = fence.holder(self.run.read_state(), self.attempt, self.place.token)
        if newer:
            self._superseded = f"{newer} has taken the run over from try {self.attempt}: this one is stopped"
            self._end()

    def _end(self) -> None:
        """Ends the workers here, and on the first node everywhere."""
        assert self._child is not None
        self._ended_here = True
        self._child.kill()

    def _act(self, number: int) -> None:
        assert self._child is not None
        name = signal.Signals(number).name
        self._log_line(f"got {name}")
        if self._signals[: self._acted].count(signal.SIGINT) > 1:
            self._killed = True
            self._child.kill()
            return
        if self.place.kind != "slurm" and self._acted == 1:
            # Under Slurm the workers got it themselves: signals go to every process of the step. Once only:
            # a second one would kill a Python that has saved its checkpoint and is on its way out.
            self._child.signal_workers(signal.SIGUSR2)
        # Of several pods perhaps only this one is told to end.
        if (self.place.first or self.place.kind == "kubernetes") and not self.run.stop_file.exists():
            # For workers that are still importing, with the signal ignored: they look here at each step.
            with contextlib.suppress(OSError):  # the disk is full: they have the signal, unless they import
                write_atomic(self.run.stop_file, f"{name}\n")

    def _memory_ran_out(self) -> bool:
        """Whether the kernel has killed a process of this node's part of the job since the agent started."""
        kills = memory.kills()
        return kills is not None and self._kills is not None and kills > self._kills

    def _broken(self, error: Exception, end: closing.Closing | None) -> int:
        """Torchrun could not even be started here."""
        cause = preflight.cause(error, self.place.name)
        self._say(cause.reason)
        with contextlib.suppress(OSError):  # the run directory may be what is broken
            if not self.place.first:
                causes.record(self.run, self.attempt, self.place.node, cause)
                self._leave(failed=True)
                return 1
            if self._child is None:
                self._started(None)
            if end is not None:
                return end.first(closing.Left(code=1, cause=cause, signals=tuple(self._signals)))
            event = ("failed", {"reason": cause.reason, "traceback": ""})
            self.run.update(event=event, state="FAILED", reason=cause.reason, exit_code=1, ended=now())
        return 1

    def _log_line(self, text: str) -> None:
        if self._log is not None:
            self._log.say(text)

    def _say(self, text: str) -> None:
        """To this node's log, and to standard error: the Slurm output file."""
        text = secrets.hide(text)
        if self._log is not None:
            self._log.say(text)
        with contextlib.suppress(OSError):  # that file's disk may be full, too
            print(f"hpcdl: {self.place.name}: {text}", file=sys.stderr, flush=True)
