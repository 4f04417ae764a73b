"""What a node sends and receives: its network interfaces, and its InfiniBand and RoCE ports.

What goes over RDMA (NCCL's own traffic on most clusters) doesn't pass through the interfaces: the ports count it.
Sources: proc(5); the kernel's sysfs-class-infiniband (port_xmit_data counts words of 4 bytes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcdl.monitor.processes import read

_WORD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes since the agent began; None where nothing counts them."""

    sent_bytes: int | None = None
    received_bytes: int | None = None
    rdma_sent_bytes: int | None = None
    rdma_received_bytes: int | None = None


class Network:
    """A node's counters, from now on.

    Args:
        proc: where /proc is.
        sys: where /sys is.
    """

    def __init__(self, proc: str = "/proc", sys: Path = Path("/sys")) -> None:
        self._proc, self._sys = proc, sys
        self._interfaces, self._ports = _Since(), _Since()
        self.look()

    def look(self) -> Traffic:
        """What has passed so far."""
        sent, received = self._interfaces.count(self._read_interfaces())
        rdma_sent, rdma_received = self._ports.count(self._read_ports())
        return Traffic(
            sent_bytes=sent,
            received_bytes=received,
            rdma_sent_bytes=rdma_sent,
            rdma_received_bytes=rdma_received,
        )

    def _read_interfaces(self) -> dict[str, tuple[int, int]]:
        found = {}
        for line in read(f"{self._proc}/net/dev").decode(errors="replace").splitlines():
            name, _, counters = line.partition(":")
            fields = counters.split()
            if len(fields) >= 16 and name.strip() != "lo":
                found[name.strip()] = (int(fields[8]), int(fields[0]))
        # A bond, a bridge or a tunnel counts once more what its hardware has counted; a container has none.
        hardware = {name for name in found if (self._sys / "class/net" / name / "device").exists()}
        return {name: found[name] for name in hardware or found}

    def _read_ports(self) -> dict[str, tuple[int, int]]:
        found = {}
        for folder in (self._sys / "class/infiniband").glob("*/ports/*/counters"):
            words = [read(f"{folder}/port_{name}_data").strip() for name in ("xmit", "rcv")]
            if all(word.isdigit() for word in words):
                found[str(folder)] = (int(words[0]) * _WORD, int(words[1]) * _WORD)
        return found


class _Since:
    """Adds up what counters have grown by: one that begins anew, or comes later, takes nothing away."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[int, int]] = {}
        self._sums = [0, 0]

    def count(self, counters: Mapping[str, tuple[int, int]]) -> tuple[int | None, int | None]:
        for name, values in counters.items():
            for way, before in enumerate(self._before.get(name, values)):
                self._sums[way] += max(0, values[way] - before)
        self._before.update(counters)
        return (self._sums[0], self._sums[1]) if self._before else (None, None)
