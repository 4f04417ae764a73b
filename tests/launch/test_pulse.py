from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from hpcdl.launch.peers import KILLED, cause_of
from hpcdl.launch.pulse import Caller, Listener, Loss
from tests.launch.making import until

HERE = "127.0.0.1"


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind((HERE, 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def first(port: int) -> Iterator[Listener]:
    listener = Listener(HERE, port, "job", ("n2", "n3"), 1.5)
    yield listener
    listener.leave()


def call(port: int, secret: str = "job", name: str = "n2") -> Caller:
    return Caller(HERE, port, secret, name, "n1", 1.5)


def raw(port: int, text: str) -> socket.socket:
    """An agent that says one thing and no more."""
    made = socket.create_connection((HERE, port))
    made.sendall(text.encode())
    return made


def heard(first: Listener, count: int) -> None:
    until(lambda: len(first.heard_of) == count, f"{count} agents are heard of")


def test_who_leaves_with_a_word_is_not_lost(first: Listener, port: int) -> None:
    caller = call(port)
    heard(first, 1)
    caller.leave()
    until(lambda: not first.heard_of, "the good-bye")
    assert first.losses == () and caller.losses == ()


def test_a_broken_connection_is_a_loss_at_once(first: Listener, port: int) -> None:
    with raw(port, "job n2\n"):
        heard(first, 1)
    (loss,) = until(lambda: first.losses, "the loss")
    assert (loss.node, loss.closed) == ("n2", True)
    assert loss.why == "the connection to its agent broke"


def test_silence_is_a_loss_after_a_while(first: Listener, port: int) -> None:
    with raw(port, "job n3\n"):
        (loss,) = until(lambda: first.losses, "the loss")
    assert (loss.node, loss.closed) == ("n3", False)
    assert loss.why.startswith("no word from its agent for ")


@pytest.mark.parametrize("text", ["other n2\n", "job n9\n", "job\n", "", "x" * 5000])
def test_strangers_are_no_losses(first: Listener, port: int, text: str) -> None:
    with raw(port, text):
        pass
    caller = call(port)  # the next in the row: by then the stranger has been dealt with
    heard(first, 1)
    caller.leave()
    assert first.losses == ()


def test_the_first_nodes_silence_is_seen_by_the_others(port: int) -> None:
    with socket.create_server((HERE, port)) as server:
        caller = call(port)
        connection, _ = server.accept()
        with connection:
            (loss,) = until(lambda: caller.losses, "the loss")
    assert (loss.node, loss.closed) == ("n1", False)
    caller.leave()


def test_the_first_nodes_end_is_seen_by_the_others(port: int) -> None:
    with socket.create_server((HERE, port)) as server:
        caller = call(port)
        server.accept()[0].close()
        (loss,) = until(lambda: caller.losses, "the loss")
    assert (loss.node, loss.closed) == ("n1", True)


@pytest.mark.parametrize("end", [True, False])
def test_the_first_node_says_whether_all_are_to_end(port: int, end: bool) -> None:
    first, caller = Listener(HERE, port, "job", ("n2",), 1.5), call(port)
    heard(first, 1)
    first.leave(end=end)
    until(lambda: not caller.connected, "the good-bye")
    assert caller.told_to_end == end
    assert caller.losses == ()


def test_a_node_says_that_it_has_failed(first: Listener, port: int) -> None:
    caller = call(port)
    heard(first, 1)
    caller.leave(failed=True)
    assert until(lambda: first.failed, "the word") == ("n2",)
    assert first.losses == ()


def test_who_never_came_is_not_lost(first: Listener, port: int) -> None:
    caller = call(port + 1)
    caller.leave()
    assert caller.losses == () and first.losses == ()


def test_a_first_node_that_was_there_and_is_gone_is_lost(port: int) -> None:
    caller = Caller(HERE, port, "job", "n2", "n1", 1.5, was_there=True)
    (loss,) = until(lambda: caller.losses, "the loss")
    assert (loss.node, loss.closed) == ("n1", False) and "can't be reached" in loss.why
    caller.leave()


def test_a_node_is_told_from_its_agent() -> None:
    loss = Loss(node="n2", why="the connection to its agent broke", last_heard="T", closed=True)
    agent, node = cause_of(loss, ""), cause_of(loss, "no answer within 3 s")
    assert (agent.kind, agent.exit_code, agent.reason) == ("killed", 137, f"SIGKILL: {KILLED} (node n2)")
    assert node.kind == "node"
    assert node.reason == (
        "NodeLost: the node is lost: the connection to its agent broke; no answer within 3 s (node n2)"
    )
