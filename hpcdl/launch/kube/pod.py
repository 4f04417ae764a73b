"""A pod's first process: `python -m hpcdl.launch.kube.pod`. The agent of each try, one after the other.

It is to a run's pods what hpcdl.launch.steps is to a Slurm job's nodes, without anybody above it: the pods agree by
the volume (hpcdl.launch.kube.meeting). It needs no right to ask the API server anything. What it ends with says what
follows (hpcdl.launch.kube); its last words stand in the pod's status as the termination message.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hpcdl import secrets
from hpcdl.errors import HpcdlError, SupersededError
from hpcdl.launch import begin, frozen, kube, torchrun
from hpcdl.launch.agent import Agent
from hpcdl.launch.kube import home
from hpcdl.launch.kube.meeting import Late, Meeting, Over, Told
from hpcdl.launch.place import Place
from hpcdl.runs import fence, wish
from hpcdl.runs.state import ACTIVE, RunState
from hpcdl.runs.store import RunDir

LAST_WORDS = Path("/dev/termination-log")
"""What the kubelet shows of it in the pod's status."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Node:
    """One pod.

    Args:
        run: the run.
        pod: what it knows of itself.
        signals: those that came already; more are added as they come.
        worker: what torchrun starts on each rank.
    """

    def __init__(self, run: RunDir, pod: home.Facts, signals: list[int], worker: Sequence[str]) -> None:
        self._run, self._pod, self._signals, self._worker = run, pod, signals, worker
        self._meeting = Meeting(run, pod, lambda: bool(self._signals), say)

    def main(self) -> int:
        """Until there is nothing more to do here; the pod's exit code."""
        try:
            if self._pod.number == 0:
                return self._first()
            return self._another()
        except Over:
            return code_of(self._run.read_state())
        except Told:
            say("told to end")
            return kube.TOLD_TO_END

    def _first(self) -> int:
        state = self._run.read_state()
        requeue, again = _next(state), 0
        while True:
            if wish.of(self._run):
                return begin.cancel(
                    self._run, self._pod.token, "cancelled before it had started", by="cancel"
                )
            self._meeting.gather()
            state = self._run.read_state()
            place = self._place(requeue, again)
            agent = self._try(place, state)
            state = self._run.read_state()
            if state.state not in ACTIVE or state.submission != self._pod.token:
                raise Over
            if fence.holder(state, place.attempt(state.attempt), self._pod.token):
                say(f"try {state.running_try} has taken over")
                return kube.NO_GOOD
            if self._signals:
                return kube.TOLD_TO_END
            if agent.again:
                again += 1
            elif state.state == "PENDING":
                requeue, again = requeue + 1, 0
            else:
                say("the agent has left no word")
                return kube.NO_GOOD

    def _another(self) -> int:
        after = ""
        while True:
            after, state = self._meeting.join(after)
            _, requeue, *again = fence.number(after)
            self._try(self._place(requeue, again[0] if again else 0), state)
            if self._signals:
                return kube.TOLD_TO_END

    def _try(self, place: Place, state: RunState) -> Agent:
        agent = Agent(self._run, place, state, self._worker, self._signals)
        agent.main()
        self._signals[:] = [number for number in agent.signals if number in _SIGNALS]
        listen(self._signals)
        return agent

    def _place(self, requeue: int, again: int) -> Place:
        pod = self._pod
        return Place(
            kind="kubernetes",
            index=pod.index,
            node=pod.number,
            nodes=pod.names,
            name=pod.names[pod.number],
            job_id=pod.job,
            rendezvous_id=f"{pod.job}-{requeue}-{again}",
            requeue=requeue,
            restarts=requeue,
            head=pod.head if pod.count > 1 else None,
            port=pod.port if pod.count > 1 else 0,
            again=again,
            token=pod.token,
        )


def _next(state: RunState) -> int:
    """The first try of a pod: after every one that this launch has had."""
    number = fence.number(state.running_try)
    return number[1] + 1 if number and number[0] == state.attempt else 0


def code_of(state: RunState) -> int:
    """What a pod of a run that is over ends with: nothing is made anew."""
    if state.state == "COMPLETED":
        return 0
    if state.state == "CANCELLED":
        return begin.INTERRUPTED
    return state.exit_code if state.exit_code in kube.FINAL else 1


def listen(signals: list[int]) -> None:
    """Collects what the kubelet says; the first process of a container has no handlers by default."""
    for number in _SIGNALS:
        signal.signal(number, lambda n, _: signals.append(n))


def say(text: str) -> None:
    """To the container's log."""
    print(f"hpcdl: {os.uname().nodename}: {secrets.hide(text)}", file=sys.stderr, flush=True)


def _leave(run: RunDir | None, pod: home.Facts | None, code: int, why: str, file: Path) -> None:
    """The last words: for whoever can't read the volume."""
    words: dict[str, object] = {"code": code, **({"why": secrets.hide(why)[:1000]} if why else {})}
    if run is not None and pod is not None and pod.number == 0:
        with contextlib.suppress(HpcdlError, OSError):
            state = run.read_state()
            words |= {
                "submission": state.submission,
                "state": state.state,
                "reason": state.reason[:1500],
                "exit_code": state.exit_code,
                "step": run.step(),
                "try": state.running_try,
                "requeues": state.requeues,
                "restarts": state.restarts,
            }
    with contextlib.suppress(OSError):
        file.write_text(json.dumps(words, ensure_ascii=False) + "\n", encoding="utf-8")


def main(
    environment: Mapping[str, str] = os.environ,
    worker: Sequence[str] = torchrun.WORKER,
    spec_dir: Path = Path(kube.SPEC_DIR),
    last_words: Path = LAST_WORDS,
) -> int:
    """Runs this pod's part; returns its exit code.

    Args:
        environment: with what hpcdl.launch.kube.pods has put there.
        worker: what torchrun starts on each rank.
        spec_dir: where the ConfigMap lies.
        last_words: the file of the termination message.
    """
    signals: list[int] = []
    listen(signals)
    run = pod = None
    why = ""
    try:
        pod = home.facts(environment, spec_dir)
        run = home.prepare(pod)
        _same_code(pod, run)
        code = Node(run, pod, signals, worker).main()
    except (SupersededError, Late) as error:
        why, code = str(error), kube.NO_GOOD if isinstance(error, Late) else 1
    except HpcdlError as error:
        why, code = str(error), error.exit_code if error.exit_code in kube.FINAL else 1
    except OSError as error:  # the volume's, this node's
        why, code = f"{type(error).__name__}: {error}", kube.NO_GOOD
    if why:
        say(why)
    _leave(run, pod, code, why, last_words)
    return code


def _same_code(pod: home.Facts, run: RunDir, warn: Callable[[str], None] = say) -> None:
    """Says so where the image's hpcdl is another one than the launcher's."""
    line = next((line for line in pod.spec.splitlines() if line.startswith("code: ")), "")
    wanted, here = line.removeprefix("code: ").strip("'\""), frozen.identity()
    known = min(
        len(wanted.split(",")), len(here.split(",")), 2
    )  # the version, and a digest where both have one
    if pod.number == 0 and wanted and here.split(",")[:known] != wanted.split(",")[:known]:
        words = f"the image has {here}; launched by {wanted}"
        warn(words)
        run.event("warning", message=words)


if __name__ == "__main__":
    sys.exit(main())
