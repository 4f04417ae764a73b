from __future__ import annotations

import socket

import pytest

from hpcdl.errors import RunFailedError
from hpcdl.launch import network


def own_address() -> str:
    """An address of this machine that is no loopback; UDP: nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network but loopback")
        return str(probe.getsockname()[0])


def test_the_way_to_the_head_says_who_we_are() -> None:
    address = own_address()
    assert network.local_address(address, 20000) == address


def test_loopback_is_refused() -> None:
    with pytest.raises(RunFailedError, match=r"127\.0\.0\.1 is a loopback address"):
        network.local_address("127.0.0.1", 20000)


def test_a_name_that_does_not_resolve_is_refused() -> None:
    with pytest.raises(RunFailedError, match=r"no-such-node\.invalid can't be reached"):
        network.local_address("no-such-node.invalid", 20000)


def test_a_taken_port_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RunFailedError, match=f"port {port} of .* can't be had"):
            network.check_port("127.0.0.1", port)
    network.check_port("127.0.0.1", port)


def test_gloo_is_told_the_interface_where_the_own_name_is_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    address = own_address()
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    name = network.gloo_settings(address, {})["GLOO_SOCKET_IFNAME"]
    assert name in [interface for _, interface in socket.if_nameindex()]
    assert name != "lo"
    assert network.gloo_settings(address, {"GLOO_SOCKET_IFNAME": "ib0"}) == {}


def test_gloo_is_left_alone_where_the_own_name_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", own_address)
    assert network.gloo_settings(own_address(), {}) == {}
