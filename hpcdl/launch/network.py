"""Addresses and ports of a job that spans nodes; standard library only.

The batch script (slurm/torchrun.sbatch) finds the head node's address and a port, since all nodes must be
told the same; here each node finds out how it is reached itself, and the head makes sure of its port.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Mapping

from hpcdl.errors import RunFailedError

_SIOCGIFADDR = 0x8915


def local_address(head: str, port: int) -> str:
    """This machine's address on the way to the head node; no packet is sent.

    Raises:
        RunFailedError: there is no way there, or only over loopback.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(head, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            address = str(probe.getsockname()[0])
    except OSError as error:
        raise RunFailedError(
            f"the head node's address {head} can't be reached from {_me()}: {error}"
        ) from error
    if ipaddress.ip_address(address).is_loopback:
        raise RunFailedError(
            f"{head} is a loopback address on {_me()}: the other nodes can't be reached over it"
        )
    return address


def check_port(address: str, port: int) -> None:
    """Binds the head node's port for a moment.

    Raises:
        RunFailedError: it is taken.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise RunFailedError(
                f"port {port} of {_me()} can't be had for the rendezvous: {error}"
            ) from error


def free_pair(address: str, start: int) -> int:
    """The first port from `start` on that can be had with the one after it.

    Raises:
        RunFailedError: none within a thousand.
    """
    for port in range(start, start + 1000, 2):
        try:
            check_port(address, port)
            check_port(address, pulse_port(port))
        except RunFailedError:
            continue
        return port
    raise RunFailedError(f"no two free ports from {start} to {start + 1000} of {_me()}")


def pulse_port(port: int) -> int:
    """Where the first node's agent listens to the others': beside the rendezvous.

    Args:
        port: of the rendezvous. The batch script has seen that both are free.
    """
    return port + 1


def gloo_settings(address: str, environment: Mapping[str, str]) -> dict[str, str]:
    """GLOO_SOCKET_IFNAME where gloo would pick loopback: it looks up the machine's own name.

    Args:
        address: this machine's address as the other nodes reach it.
        environment: a choice of the user's stands.
    """
    if "GLOO_SOCKET_IFNAME" in environment or not _own_name_is_useless():
        return {}
    name = _interface(address)
    return {"GLOO_SOCKET_IFNAME": name} if name else {}


def _own_name_is_useless() -> bool:
    try:
        address = socket.getaddrinfo(socket.gethostname(), None)[0][4][0]
    except OSError:
        return True
    return ipaddress.ip_address(str(address).partition("%")[0]).is_loopback


def _interface(address: str) -> str | None:
    """The network interface that has an IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(control.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _me() -> str:
    return socket.gethostname()
