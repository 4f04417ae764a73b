"""When the pods of a run begin a try, and which one: agreed on by small files on the volume they all have.

The first pod alone decides (it owns the run's state). It begins a try once every other pod has been heard of: each
one that waits counts a number up in `<run>/.pods/<number>.json`, twice a second. Then its agent writes the try's
number into state.json (`running_try`), and the others, who look there, join it.

A pod joins a try once: it leaves its uid there. One that was made anew while a try still goes on in the others finds
its forerunner's uid, tells the first pod that this try is over, and waits for the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hpcdl.errors import RunFailedError
from hpcdl.launch import causes, network, peers, pulse
from hpcdl.launch.kube import home
from hpcdl.runs import fence
from hpcdl.runs.files import write_json
from hpcdl.runs.state import ACTIVE, RunState
from hpcdl.runs.store import RunDir, now

FOLDER = ".pods"
BEAT_S = 0.5
TELL_AFTER_S = 5.0
"""Waiting that is told in the run's state."""
NAME_S = 300.0
"""How long the first pod's name may have no address: DNS is told of a pod some seconds after it has begun."""


class Told(Exception):
    """The kubelet has told this pod to end."""


class Over(Exception):
    """The run is over, or somebody else's; the state says how."""


class Late(RunFailedError):
    """The others have not come in time."""


class Meeting:
    """One pod's part in it.

    Args:
        run: the run.
        pod: this pod.
        told: whether the kubelet has told it to end.
        say: takes a remark.
    """

    def __init__(
        self, run: RunDir, pod: home.Facts, told: Callable[[], bool], say: Callable[[str], None]
    ) -> None:
        self._run, self._pod, self._told, self._say = run, pod, told, say
        self._folder = run.path / FOLDER
        self._folder.mkdir(exist_ok=True)
        self._beats = 0

    def gather(self) -> None:
        """The first pod waits here for all others.

        Raises:
            Told, Over, Late: it needn't wait any longer.
        """
        began, said = time.monotonic(), ""
        seen = {number: self._beat_of(number) for number in range(1, self._pod.count)}
        while seen:
            self._look(began)
            seen = {number: beat for number, beat in seen.items() if beat == self._beat_of(number)}
            if (
                seen
                and time.monotonic() - began > TELL_AFTER_S
                and (words := _waits_for(seen, self._pod.count)) != said
            ):
                said = words
                self._say(words)
                self._tell(words)
            if seen:
                time.sleep(BEAT_S / 2)
        self._tell("")
        self.address()

    def join(self, after: str) -> tuple[str, RunState]:
        """Another pod waits here for the next try that it can join; its number, and the run's state.

        Args:
            after: the last try that it has been in; empty for none.

        Raises:
            Told, Over, Late: it needn't wait any longer.
        """
        began = time.monotonic()
        while True:
            state = self._look(began)
            if state is not None and state.state == "RUNNING" and self._is_new(state, after):
                if self._mark(state.running_try):
                    self.address()
                    return state.running_try, state
                after = state.running_try
                self._say(f"try {after} was another pod's, which is gone: it is over")
                self.over(after)
            self._beat()
            time.sleep(BEAT_S)

    def address(self) -> None:
        """Waits until the first pod's name leads somewhere.

        Raises:
            RunFailedError: it doesn't.
            Told: this pod is to end.
        """
        if self._pod.count == 1:
            return
        deadline = time.monotonic() + NAME_S
        while True:
            try:
                socket.getaddrinfo(self._pod.head, self._pod.port)
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RunFailedError(
                        f"the first pod's name {self._pod.head} has no address after {NAME_S:g} s ({error}): is there "
                        f"a headless Service {self._pod.service}, and does the cluster's DNS work?"
                    ) from error
            if self._told():
                raise Told
            time.sleep(BEAT_S)

    def over(self, attempt: str) -> None:
        """Tells the first pod that a try is over: this pod's part of it is gone."""
        pod = self._pod
        secret = f"{pod.token}/{pod.index}/{attempt}"
        name = pod.names[pod.number]
        causes.record(self._run, attempt, pod.number, peers.agent_killed(name, now()))
        with contextlib.suppress(OSError):  # then it has gone as well, and begins another try
            pulse.tell_failed(pod.head, network.pulse_port(pod.port), secret, name)

    def _look(self, began: float) -> RunState | None:
        """The run's state, if it is this Job's."""
        if self._told():
            raise Told
        state = self._run.read_state()
        ours = home.is_ours(self._run, self._pod, state)
        if state.state not in ACTIVE and (ours or state.state == "COMPLETED"):
            raise Over
        if time.monotonic() - began > self._pod.wait_s:
            minutes = self._pod.wait_s / 60
            raise Late(
                f"the other pods have not come within {minutes:g} min (cluster.kubernetes.wait_for_pods_min): "
                "is there room for all of them at once? A queue (cluster.kubernetes.queue) starts all or none"
            )
        return state if ours else None

    def _is_new(self, state: RunState, after: str) -> bool:
        number = fence.number(state.running_try)
        return bool(number) and number[0] == state.attempt and number > fence.number(after)

    def _mark(self, attempt: str) -> bool:
        """Whether this very pod is the one that joins a try."""
        path = self._folder / f"{attempt}-{self._pod.number}"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            return False
        os.write(descriptor, self._pod.uid.encode())
        os.close(descriptor)
        return True

    def _beat(self) -> None:
        self._beats += 1
        write_json(self._file(self._pod.number), {"uid": self._pod.uid, "beat": self._beats}, durable=False)

    def _beat_of(self, number: int) -> str:
        try:
            text = self._file(number).read_text(encoding="utf-8")
            json.loads(text)
        except (OSError, ValueError):
            return ""
        return text

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.json"

    def _tell(self, words: str) -> None:
        state = self._run.read_state()
        if (
            state.state == "PENDING"
            and state.submission == self._pod.token
            and (words or state.reason.startswith(_WAITS))
        ):
            self._run.update(expect=state, reason=words)


_WAITS = "waits for pod"


def _waits_for(numbers: Sequence[int] | dict[int, str], count: int) -> str:
    names = ", ".join(str(number) for number in list(numbers)[:8]) + (", …" if len(numbers) > 8 else "")
    return f"{_WAITS}{'s' if len(numbers) > 1 else ''} {names} of {count}"
