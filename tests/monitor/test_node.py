"""A node's memory, cores and counters, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpcdl.monitor.network import Network
from hpcdl.monitor.node import Memory, Node
from hpcdl.plan.cgroups import of_memory

MIB = 1 << 20
NO_LIMIT = "9223372036854771712\n"


def make(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    make(
        tmp_path / "proc",
        meminfo=f"MemTotal: {1000 * 1024} kB\nMemFree: 5 kB\nMemAvailable: {800 * 1024} kB\nHugePages_Total: 0",
        stat="cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1 2 3",
    )
    return tmp_path / "proc"


def memory(tmp_path: Path, membership: str) -> Memory:
    (tmp_path / "cgroup").write_text(membership)
    return Node(str(tmp_path / "proc"), tmp_path / "cgroup", tmp_path / "groups").memory()


def group(version: int, limit: object, used: int, cached: int) -> dict[str, Any]:
    if version == 2:
        stat = f"anon 5\ninactive_file {cached}\nactive_file 0\nslab_reclaimable 0"
        return {"memory__max": limit, "memory__current": used, "memory__stat": stat}
    stat = f"inactive_file 1\ntotal_inactive_file {cached}\ntotal_active_file 0"
    return {"memory__limit_in_bytes": limit, "memory__usage_in_bytes": used, "memory__stat": stat}


@pytest.mark.usefixtures("proc")
def test_the_machines_memory(tmp_path: Path) -> None:
    assert memory(tmp_path, "") == Memory(available_bytes=800 * MIB, limit_bytes=1000 * MIB)
    make(tmp_path / "groups" / "job", **group(2, "max", 5, 0))
    assert memory(tmp_path, "0::/job\n").limit_bytes == 1000 * MIB
    make(tmp_path / "groups" / "memory" / "job", **group(1, NO_LIMIT.strip(), 5, 0))
    assert memory(tmp_path, "4:memory:/job\n0::/\n").limit_bytes == 1000 * MIB


@pytest.mark.usefixtures("proc")
@pytest.mark.parametrize("version", [1, 2])
def test_the_jobs_own_memory_is_what_its_groups_leave(tmp_path: Path, version: int) -> None:
    """Slurm limits the job, and may limit its step; what is cached is given back before anybody is killed."""
    top = tmp_path / "groups" / ("memory" if version == 1 else "")
    make(top / "slurm" / "job_1", **group(version, 400 * MIB, 390 * MIB, 90 * MIB))
    make(top / "slurm" / "job_1" / "step_0", **group(version, 500 * MIB, 100 * MIB, 0))
    said = "9:name=systemd:/x\n4:memory:/slurm/job_1/step_0\n0::/\n"
    found = memory(tmp_path, said if version == 1 else "0::/slurm/job_1/step_0\n")
    assert found == Memory(available_bytes=100 * MIB, limit_bytes=400 * MIB)
    assert found.share_left == 0.25
    # In a container the path is the host's, and only the top is there.
    make(top, **group(version, 300 * MIB, 50 * MIB, 0))
    inside = "4:memory:/docker/abc\n" if version == 1 else "0::/docker/abc\n"
    assert memory(tmp_path, inside) == Memory(available_bytes=250 * MIB, limit_bytes=300 * MIB)


def test_memory_that_nobody_tells(tmp_path: Path) -> None:
    found = memory(tmp_path, "0::/\n")
    assert found == Memory() and found.share_left == 1.0
    assert of_memory(tmp_path / "none", tmp_path) is None


def test_cores(tmp_path: Path, proc: Path) -> None:
    node = Node(str(proc), tmp_path / "none", tmp_path)
    assert node.cpu_percent() is None, "no tick since"
    make(proc, stat="cpu  160 0 100 730 110 0 0 0 0 0")
    assert node.cpu_percent() == 60.0
    (proc / "stat").unlink()
    assert node.cpu_percent() is None


def interfaces(proc: Path, **counters: tuple[int, int]) -> None:
    lines = [f"{name}: {came} 0 0 0 0 0 0 0 {went} 0 0 0 0 0 0 0" for name, (came, went) in counters.items()]
    make(proc / "net", dev="\n".join(["Inter-| Receive", " face |bytes", *lines]))


def test_network(tmp_path: Path) -> None:
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    interfaces(proc, lo=(5, 5), eth0=(100, 200), bond0=(1000, 2000))
    network = Network(str(proc), sys)
    interfaces(proc, lo=(50, 50), eth0=(110, 205), bond0=(1001, 2002))
    traffic = network.look()
    assert (traffic.received_bytes, traffic.sent_bytes) == (11, 7)
    assert (traffic.rdma_sent_bytes, traffic.rdma_received_bytes) == (None, None)
    # Where there is hardware, a bond counts it once more; a counter may begin anew, an interface come later.
    (sys / "class/net/eth0/device").mkdir(parents=True)
    (sys / "class/net/eth1/device").mkdir(parents=True)
    network = Network(str(proc), sys)
    interfaces(proc, lo=(50, 50), eth0=(7, 215), bond0=(2000, 3000), eth1=(90, 90))
    assert (network.look().received_bytes, network.look().sent_bytes) == (0, 10)
    interfaces(proc, eth0=(17, 215), eth1=(95, 96))
    assert (network.look().received_bytes, network.look().sent_bytes) == (15, 16)


def test_rdma(tmp_path: Path) -> None:
    ports = [tmp_path / f"sys/class/infiniband/mlx5_{number}/ports/1/counters" for number in (0, 1)]
    for port in ports:
        make(port, port_xmit_data=1000, port_rcv_data=2000)
    network = Network(str(tmp_path / "proc"), tmp_path / "sys")
    make(ports[0], port_xmit_data=1010, port_rcv_data=2001)
    make(ports[1], port_xmit_data=1001, port_rcv_data="N/A")
    traffic = network.look()
    assert (traffic.rdma_sent_bytes, traffic.rdma_received_bytes) == (40, 4), "they count words of 4 bytes"
    assert (traffic.sent_bytes, traffic.received_bytes) == (None, None)
