"""The job's steps, seen from its first node:
`python -m hpcdl.launch.steps RUNS_FILE [INDEX] -- srun OPTION… [-- PROGRAM…]`.

One srun starts an agent on each node. Usually that is all: the job ends with srun's own code. But the first
node's agent can be killed before it has said what follows, by whoever kills it, or by srun, which ends the whole
step at once where a node or another agent is gone. Then state.json still says RUNNING, and what that agent would
have said is said here (hpcdl.launch.closing): the run is started anew in this job, where the nodes for it are
left, or goes into the queue again.

    killed                          seen by
    a worker, torchrun              the agent of its node
    an agent, a node                the first node's agent (hpcdl.launch.pulse), else this process
    the first node's agent          this process
    the first node, this process    Slurm, which queues the job again or calls it FAILED; the next poll sees it

A new try in the same job needs no wait in the queue: another srun, on the nodes that answer.

PROGRAM is what the agent is started with inside of a container (hpcdl.launch.containers), instead of this Python; then
Slurm's commands are run here for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpcdl import secrets
from hpcdl.errors import HpcdlError, SupersededError, UsageError
from hpcdl.launch import causes, closing, control, network, nodes, peers, progress, torchrun
from hpcdl.launch.causes import Cause
from hpcdl.launch.child import started_at
from hpcdl.launch.job import run_path
from hpcdl.launch.place import Place, find
from hpcdl.launch.requeue import HANDED_OVER
from hpcdl.runs import fence, outside
from hpcdl.runs.scheduler import run_command
from hpcdl.runs.state import ACTIVE, RunState
from hpcdl.runs.store import RunDir, now

_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_POLL_S = 0.2
_LOOK_S = 1.0
"""Between two looks at state.json."""
_SRUN_GRACE_S = 3.0
"""How long srun may go on after the first node's agent has gone: for the others to end as well. With a node lost
it would wait until Slurm calls that node down (SlurmdTimeout, 300 s by default); and Slurm then puts the job back
into its queue, though a successor may have taken the run over."""
_AGENT = ("-m", "hpcdl.launch.job")


@dataclass(slots=True)
class Steps:
    """The steps of one job.

    Args:
        run: the run that it carries.
        place: the first node's; `again` counts the steps.
        runs_file: `<submission>/runs.txt`.
        srun: srun and its options, without the program.
        agent: the program: the Python and its arguments, RUNS_FILE and INDEX among them.
        inside: the environment in which srun starts it, where that is inside of a container.
    """

    run: RunDir
    place: Place
    runs_file: Path
    srun: Sequence[str]
    agent: Sequence[str]
    inside: Mapping[str, str] | None = None
    _signals: list[int] = field(default_factory=list)
    _passed: int = 0

    def main(self) -> int:
        """Until the job has nothing more to do; its exit code."""
        for number in _SIGNALS:
            signal.signal(number, lambda n, _: self._signals.append(n))
        while True:
            code = self._step()
            if code == 0:
                return 0
            again, code = self._after(code)
            if not again:
                return code
            self.place = replace(self.place, nodes=again, again=(self.place.again or 0) + 1)

    def _step(self) -> int:
        """One srun; its exit code."""
        number = self.place.again or 0
        environment = {
            **(self.inside or os.environ),
            "HPCDL_AGAIN": str(number),
            "HPCDL_NODES": " ".join(self.place.nodes),
        }
        srun = [*self.srun]
        if number:
            count = len(self.place.nodes)
            # The last of an option counts. The step before may still be on its way out, and with a lost node it is
            # for minutes: --overlap shares its CPUs, --mem=0 takes the job's memory without counting it twice.
            srun += [f"--nodes={count}", f"--ntasks={count}", f"--nodelist={','.join(self.place.nodes)}"]
            srun += ["--overlap", "--mem=0"]
            if count > 1:
                assert self.place.head is not None
                port = network.free_pair(self.place.head, self.place.port + 2)
                environment["HPCDL_PORT"] = str(port)
        process = subprocess.Popen([*srun, *self.agent], env=environment)
        watch, killed = _FirstAgent(self.run, self.place), False
        while process.poll() is None:
            for signal_number in self._signals[self._passed :]:
                self._passed += 1
                process.send_signal(signal_number)
            if watch.gone_for() > _SRUN_GRACE_S:
                _say(f"srun (process {process.pid}) goes on, the first node's agent is gone: srun is killed")
                process.kill()
                killed = True
            time.sleep(_POLL_S)
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        return self._agents_code(code) if killed else code

    def _agents_code(self, code: int) -> int:
        """What srun would have ended with: the first node's agent's code, as far as the state tells it."""
        state = self.run.read_state()
        if state.submission != self.place.token:
            return HANDED_OVER
        return code if state.state in ACTIVE else state.exit_code or code

    def _after(self, code: int) -> tuple[tuple[str, ...], int]:
        """Nodes of the next step, none where there is no such step; and the job's exit code then."""
        state = self.run.read_state()
        attempt = self.place.attempt(state.attempt)
        if state.submission != self.place.token or fence.number(state.running_try) > fence.number(attempt):
            return (), code
        started = state.running_try == attempt
        if started and state.state == "RUNNING":
            decided = self._decided(attempt)
            return (decided, code) if decided is not None else self._speak(state, attempt, code)
        if not started and state.state in ACTIVE and (silent := nodes.silent(self.place.nodes)):
            return self._speak(state, attempt, code, silent)  # srun could not even start all agents
        if not started and state.state in ACTIVE and causes.of_nodes(self.run, attempt):
            # Another node's agent has given up so soon that srun ended the first one before it could listen.
            return self._tell(attempt, self._left(code))
        if not started and state.state in ACTIVE and self.place.again:
            return self._no_step(attempt, code)
        return (), code

    def _no_step(self, attempt: str, code: int) -> tuple[tuple[str, ...], int]:
        """Slurm has refused another step in this job: the queue is left."""
        words = f"srun could not start the next try (exit code {code})"
        cause = Cause(time=now(), type="ExitCode", message=words, node=self.place.name, code=code)
        self.place = replace(self.place, again=None)
        return self._tell(attempt, self._left(code, cause))

    def _decided(self, attempt: str) -> tuple[str, ...] | None:
        """The nodes of the next step, if the first node's agent has said that there is one."""
        for event in reversed(self.run.events()):
            if event.get("event") == "started":
                return None
            if event.get("event") == progress.RESTARTING and event.get("in_place") == progress.BY_THE_JOB:
                return tuple(event["nodes"]) if event.get("try") == attempt else None
        return None

    def _speak(
        self, state: RunState, attempt: str, code: int, silent: Mapping[str, str] | None = None
    ) -> tuple[tuple[str, ...], int]:
        """Says what the first node's agent can't say any more."""
        silent = nodes.silent(self.place.nodes) if silent is None else silent
        if silent:
            name, why = next(iter(silent.items()))
            cause = peers.node_lost(name, now(), why)
        else:
            cause = peers.agent_killed(state.node_list[0] if state.node_list else self.place.name, now())
        return self._tell(attempt, self._left(code, cause, tuple(silent)))

    def _left(self, code: int, cause: Cause | None = None, lost: tuple[str, ...] = ()) -> closing.Left:
        return closing.Left(code=code, signals=tuple(self._signals), speechless=True, cause=cause, lost=lost)

    def _tell(self, attempt: str, left: closing.Left) -> tuple[tuple[str, ...], int]:
        end = closing.Closing(self.run, self.place, attempt, torchrun.resources(self.run), _say)
        code = left.code
        try:
            code = end.first(left)
        except SupersededError as error:
            _say(str(error))
        return end.again, code


class _FirstAgent:
    """Whether the first node's agent is there: a process of this machine.

    Args:
        run: the run.
        place: this try's.
    """

    def __init__(self, run: RunDir, place: Place) -> None:
        self._run = run
        self._place = place
        self._pid: tuple[int, float | None] | None = None
        self._next_look = 0.0
        self._gone_since: float | None = None

    def gone_for(self) -> float:
        """Seconds since it has gone; 0 as long as it is there, and after an end that the others follow."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_S
            self._look()
        return time.monotonic() - self._gone_since if self._gone_since is not None else 0.0

    def _look(self) -> None:
        if self._pid is None:
            state = self._run.read_state()
            mine = state.running_try == self._place.attempt(state.attempt) and state.state == "RUNNING"
            # Once seen from here, it isn't hidden by a container.
            if mine and state.agent_pid and _alive(state.agent_pid, state.agent_started):
                self._pid = (state.agent_pid, state.agent_started)
        elif self._gone_since is None and not _alive(*self._pid):
            done = self._run.read_state().state == "COMPLETED"
            self._gone_since = None if done else time.monotonic()


def _alive(pid: int, started: float | None) -> bool:
    try:
        zombie = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "Z"
        return not zombie and abs(started_at(pid) - (started or 0.0)) < 2.0
    except OSError:
        return False


def _say(text: str) -> None:
    print(f"hpcdl: {os.uname().nodename}: {secrets.hide(text)}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Runs the job's steps; returns the job's exit code.

    Args:
        argv: RUNS_FILE, outside of an array the line of it, `--`, srun and its options; `--` and what it starts
            inside of a container.
    """
    try:
        own, srun, program = _split(argv)
        runs_file = Path(own[0])
        place = find(runs_file, int(own[1]) if len(own) == 2 else None, os.environ)
        place = replace(place, node=0, again=0)
        run = RunDir(run_path(runs_file, place.index))
    except (HpcdlError, OSError) as error:
        print(f"hpcdl: {os.uname().nodename}: {error}", file=sys.stderr, flush=True)
        return error.exit_code if isinstance(error, HpcdlError) else 1
    steps = Steps(run, place, runs_file, srun, [*(program or [sys.executable]), *_AGENT, *own])
    if not program:
        return steps.main()
    from hpcdl.launch import containers  # and with it the whole spec, which few jobs need here

    with contextlib.closing(outside.Outside(_command_for_the_inside)) as other:
        steps.inside = containers.environment({**os.environ, outside.VARIABLE: other.name})
        return steps.main()


def _command_for_the_inside(command: Sequence[str], text: str, limit_s: float) -> outside.Done:
    """Runs what an agent in a container asks for. A job is given this environment, not the container's."""
    if command[0] == "sbatch":
        return control.run(list(command), limit_s, control.submitting())
    return run_command(command, text, limit_s)


def _split(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """RUNS_FILE and INDEX; srun and its options; the program inside, empty without a container."""
    parts: list[list[str]] = [[]]
    for word in argv:
        if word == "--" and len(parts) < 3:
            parts.append([])
        else:
            parts[-1].append(word)
    if len(parts[0]) not in (1, 2) or not all(parts) or len(parts) == 1:
        usage = "usage: python -m hpcdl.launch.steps RUNS_FILE [INDEX] -- srun OPTION… [-- PROGRAM…]"
        raise UsageError(usage)
    return parts[0], parts[1], parts[2] if len(parts) == 3 else ()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
