"""What an agent makes of the other nodes' silence: which node, or which agent, ended the try."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hpcdl.launch import network, nodes
from hpcdl.launch.causes import Cause
from hpcdl.launch.place import Place
from hpcdl.launch.pulse import Caller, Listener, Loss, Pulse
from hpcdl.runs import kinds

_NOTICE_S = 3.0
"""How long the first node's own workers have to notice another node's failure: what they say tells more."""
KILLED = "its agent was killed (kill -9, or by the kernel for want of memory)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """The try can't go on."""

    words: str
    """For the log."""
    cause: Cause | None = None
    """On the first node: why. On another one: that the first one is lost."""
    lost: tuple[str, ...] = ()
    """On the first node: nodes that can't be used any more."""


class Peers:
    """The other nodes' agents, as this one hears of them.

    Args:
        place: which part of which job this is; of more than one node.
        attempt: this try.
        lost_after_s: silence after which a node is lost (cluster.lost_after_s).

    Raises:
        RunFailedError: the first node's port is taken.
    """

    def __init__(self, place: Place, attempt: str, lost_after_s: float) -> None:
        assert place.head is not None
        self._first = place.first
        self._in_pods = place.kind == "kubernetes"
        self._known: set[str] = set()
        self._failed_since = 0.0
        secret = f"{place.token}/{place.index}/{attempt}"
        port = network.pulse_port(place.port)
        if place.first:
            network.check_port(place.head, port)
            others = place.nodes[1:]
            self._pulse: Pulse = Listener(place.head, port, secret, others, lost_after_s)
        else:
            self._pulse = Caller(
                place.head, port, secret, place.name, place.nodes[0], lost_after_s,
                was_there=place.kind == "kubernetes",
            )  # fmt: skip

    def news(self) -> list[str]:
        """Nodes whose agents are heard of for the first time; on the first node only."""
        new = [name for name in self._pulse.heard_of if name not in self._known]
        self._known.update(new)
        return new

    def look(self) -> Over | None:
        """Whether the try is over because of another node."""
        losses = self._pulse.losses
        if not losses and self._pulse.told_to_end:
            return Over(words="the first node's agent ends the try")
        if not losses:
            return self._failed()
        loss = losses[0]
        words = f"node {loss.node} is lost: {loss.why}"
        if not self._first:
            # Its supervisor or Slurm decides, or this node's agent (hpcdl.launch.survivor).
            return Over(words=words, cause=node_lost(loss.node, loss.last_heard, loss.why))
        gone = not loss.closed or self._in_pods  # a pod ends with its agent
        silent = {loss.node: loss.why} if gone else nodes.silent([loss.node])
        return Over(words=words, cause=cause_of(loss, silent.get(loss.node, "")), lost=tuple(silent))

    def _failed(self) -> Over | None:
        """Another node's part has failed, and here nothing is noticed of it: the workers may still be starting."""
        failed = self._pulse.failed
        if not failed:
            return None
        self._failed_since = self._failed_since or time.monotonic()
        if time.monotonic() - self._failed_since < _NOTICE_S:
            return None
        return Over(words=f"node {failed[0]} has failed")

    def leave(self, *, end: bool = False, failed: bool = False) -> None:
        """This node's part is over.

        Args:
            end: from the first node: the others' as well.
            failed: from another node: it has failed.
        """
        self._pulse.leave(end=end, failed=failed)


def cause_of(loss: Loss, silent: str) -> Cause:
    """Why the try ended, at the time when that agent was last heard of.

    Args:
        loss: what the others' agents saw.
        silent: why the node itself is taken for lost; empty where it answers, and only its agent is gone.
    """
    if silent:
        return node_lost(loss.node, loss.last_heard, f"{loss.why}; {silent}" if loss.closed else silent)
    return agent_killed(loss.node, loss.last_heard)


def node_lost(node: str, time: str, why: str) -> Cause:
    """A node that is gone, or cut off."""
    return Cause(time=time, type=kinds.NODE_LOST, message=f"the node is lost: {why}", node=node)


def agent_killed(node: str, time: str) -> Cause:
    """An agent that is gone from a node that answers."""
    return Cause(time=time, type="SIGKILL", message=KILLED, node=node, signal=9)
