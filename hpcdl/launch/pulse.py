"""The agents of one job hear of each other: who is lost is known in seconds, whatever the workers are doing.

A node whose power fails or whose network is cut says nothing more, and nobody is told: gloo's and NCCL's sockets
wait for TCP's own patience (some 15 minutes) or the process group's time-out (half an hour, so that a rank may
load for long), torchrun's rendezvous drops the node and goes on, and Slurm looks every SlurmdTimeout (300 s by
default). So each agent holds one TCP connection to the first node's, and both send a byte a second.

    what is seen                           what it means
    the connection breaks, without `bye`   the agent was killed, or its machine is gone: known at once
    no byte for `cluster.lost_after_s`     the machine hangs or is cut off; it comes to the same conclusion about
                                           the first node, and stops its own workers
Who was never heard of is not missed here: torchrun waits for it at the rendezvous.

It runs in a thread that touches no disk: a shared disk that hangs is no lost node.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field

from hpcdl.runs.store import now

BEAT_S = 1.0
_CONNECT_S = 5.0
_BYE = b"bye\n"
_END = b"end\n"
_FAILED = b"failed\n"
_BEAT = b".\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Another node's agent is not heard of any more."""

    node: str
    why: str
    last_heard: str
    """When it last was: UTC, ISO 8601. What the workers say of broken connections came later."""
    closed: bool
    """Whether its connection broke (else it fell silent)."""


@dataclass(slots=True)
class _Line:
    """One connection: what came over it, and when."""

    socket: socket.socket
    node: str = ""
    rest: bytes = b""
    heard: float = field(default_factory=time.monotonic)
    heard_at: str = field(default_factory=now)
    bye: bool = False

    def read(self) -> list[bytes] | None:
        """Whole lines that have come; None once the other end has closed."""
        try:
            data = self.socket.recv(4096)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard, self.heard_at = time.monotonic(), now()
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [line + b"\n" for line in lines]

    def send(self, data: bytes) -> None:
        # A peer that takes nothing is found by its silence.
        with contextlib.suppress(OSError):
            self.socket.send(data)


def tell_failed(address: str, port: int, secret: str, name: str) -> None:
    """Tells the first node's agent that a node's part of a try has failed, in the place of an agent that is gone.

    Args:
        address: of the first node.
        port: where its agent listens.
        secret: the try's.
        name: the node's.

    Raises:
        OSError: nobody listens there.
    """
    with socket.create_connection((address, port), timeout=_CONNECT_S) as made:
        made.sendall(f"{secret} {name}\n".encode() + _FAILED + _BYE)


class Pulse:
    """One agent's side: a Listener on the first node, a Caller on the others."""

    def __init__(self, lost_after_s: float) -> None:
        self._lost_after_s = lost_after_s
        self._lock = threading.Lock()
        self._losses: list[Loss] = []
        self._ended = False
        self._final = _BYE
        self._leaving = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def losses(self) -> tuple[Loss, ...]:
        """Nodes that were lost, in the order of their loss."""
        with self._lock:
            return tuple(self._losses)

    @property
    def told_to_end(self) -> bool:
        """Whether the first node has said that the try is over."""
        return self._ended

    @property
    def heard_of(self) -> tuple[str, ...]:
        """On the first node: those whose agents are connected now."""
        return ()

    @property
    def failed(self) -> tuple[str, ...]:
        """On the first node: those whose agents have said that their part has failed."""
        return ()

    def leave(self, *, end: bool = False, failed: bool = False) -> None:
        """Says good-bye, so that this end is none to worry about.

        Args:
            end: by the first node: the others are to end as well.
            failed: by another node: its part has failed, and it has left word of it (hpcdl.launch.causes).
        """
        self._final = (_END if end else _FAILED if failed else b"") + _BYE
        self._leaving.set()
        if self._thread is not None:
            self._thread.join(2 * BEAT_S)

    def _lose(self, line: _Line, *, closed: bool) -> None:
        why = (
            "the connection to its agent broke"
            if closed
            else f"no word from its agent for {time.monotonic() - line.heard:.0f} s"
        )
        loss = Loss(node=line.node, why=why, last_heard=line.heard_at, closed=closed)
        with self._lock:
            self._losses.append(loss)

    def _start(self, target: threading.Thread) -> None:
        self._thread = target
        target.start()


class Listener(Pulse):
    """The first node's side.

    Args:
        address: its own, as the others reach it.
        port: a free one that all have been told.
        secret: what a caller must say first: two jobs' agents never mix.
        nodes: names of the job's other nodes.
        lost_after_s: silence after which a node is lost.

    Raises:
        OSError: the port can't be had.
    """

    def __init__(
        self, address: str, port: int, secret: str, nodes: tuple[str, ...], lost_after_s: float
    ) -> None:
        super().__init__(lost_after_s)
        self._secret = secret
        self._nodes = nodes
        self._lines: dict[int, _Line] = {}
        self._failed: list[str] = []
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._server = socket.socket(family, socket.SOCK_STREAM)
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._server.bind((address, port))
        self._server.listen(len(nodes) + 8)
        self._server.setblocking(False)
        self._start(threading.Thread(target=self._run, name="pulse", daemon=True))

    @property
    def failed(self) -> tuple[str, ...]:
        """Those whose agents have said that their part has failed."""
        return tuple(self._failed)

    @property
    def heard_of(self) -> tuple[str, ...]:
        """Nodes whose agents are connected now."""
        return tuple(line.node for line in list(self._lines.values()) if line.node and not line.bye)

    def _run(self) -> None:
        lines = self._lines
        with selectors.DefaultSelector() as chooser:
            chooser.register(self._server, selectors.EVENT_READ)
            beat = 0.0
            while not self._leaving.is_set():
                for key, _ in chooser.select(BEAT_S / 4):
                    if key.fileobj is self._server:
                        self._accept(lines, chooser)
                    else:
                        self._take(lines[key.fd], lines, chooser)
                if time.monotonic() >= beat:
                    beat = time.monotonic() + BEAT_S
                    for line in lines.values():
                        line.send(_BEAT)
                for line in list(lines.values()):
                    if time.monotonic() - line.heard > self._lost_after_s:
                        self._drop(line, lines, chooser, closed=False)
            for line in lines.values():
                line.send(self._final)
                line.socket.close()
        self._server.close()

    def _accept(self, lines: dict[int, _Line], chooser: selectors.BaseSelector) -> None:
        with contextlib.suppress(OSError):
            caller, _ = self._server.accept()
            caller.setblocking(False)
            lines[caller.fileno()] = _Line(caller)
            chooser.register(caller, selectors.EVENT_READ)

    def _take(self, line: _Line, lines: dict[int, _Line], chooser: selectors.BaseSelector) -> None:
        said = line.read()
        if said is None or line.rest[512:]:
            self._drop(line, lines, chooser, closed=True)
            return
        for word in said:
            if word == _BYE:
                line.bye = True
            elif word == _FAILED and line.node:
                self._failed.append(line.node)
            elif not line.node and word != _BEAT:
                secret, _, name = word.decode(errors="replace").strip().partition(" ")
                if secret == self._secret and name in self._nodes:
                    line.node = name

    def _drop(
        self, line: _Line, lines: dict[int, _Line], chooser: selectors.BaseSelector, *, closed: bool
    ) -> None:
        chooser.unregister(line.socket)
        del lines[line.socket.fileno()]
        line.socket.close()
        if line.node and not line.bye:  # else it was no agent of this job, or it had said so
            self._lose(line, closed=closed)


class Caller(Pulse):
    """Another node's side.

    Args:
        address: of the first node.
        port: where its agent listens.
        secret: this try's.
        name: this node's.
        first: the first node's name.
        lost_after_s: silence after which the first node is lost.
        was_there: whether the first node's agent has begun this try already: then nobody there is silence too.
    """

    def __init__(
        self,
        address: str,
        port: int,
        secret: str,
        name: str,
        first: str,
        lost_after_s: float,
        *,
        was_there: bool = False,
    ) -> None:
        super().__init__(lost_after_s)
        self._was_there = was_there
        self._target = (address, port)
        self._hello = f"{secret} {name}\n".encode()
        self._first = first
        self._start(threading.Thread(target=self._run, name="pulse", daemon=True))

    @property
    def connected(self) -> bool:
        """Whether the first node's agent is still to be heard of, or heard."""
        return self._thread is None or self._thread.is_alive()

    def _run(self) -> None:
        line = self._connect()
        if line is None:
            return
        line.node = self._first
        beat = 0.0
        said: list[bytes] | None = []
        with selectors.DefaultSelector() as chooser:
            chooser.register(line.socket, selectors.EVENT_READ)
            while not self._leaving.is_set():
                said = line.read() if chooser.select(BEAT_S / 4) else []
                if said is None:
                    break
                self._ended |= _END in said
                line.bye |= _BYE in said
                if time.monotonic() >= beat:
                    beat = time.monotonic() + BEAT_S
                    line.send(_BEAT)
                if line.bye or time.monotonic() - line.heard > self._lost_after_s:
                    break
        if self._leaving.is_set():
            line.send(self._final)
        elif not line.bye:
            self._lose(line, closed=said is None)
        line.socket.close()

    def _connect(self) -> _Line | None:
        """Until the first node listens; nobody is lost who was never there."""
        began, began_at = time.monotonic(), now()
        while not self._leaving.wait(BEAT_S / 4):
            if self._was_there and time.monotonic() - began > self._lost_after_s:
                why = f"its agent can't be reached for {time.monotonic() - began:.0f} s"
                with self._lock:
                    self._losses.append(Loss(node=self._first, why=why, last_heard=began_at, closed=False))
                return None
            try:
                made = socket.create_connection(self._target, timeout=_CONNECT_S)
                made.sendall(self._hello)
            except OSError:
                continue
            made.setblocking(False)
            return _Line(made)
        return None
