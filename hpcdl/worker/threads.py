"""CPU threads of a worker: how many, on which cores, and beside which memory.

`read_topology` looks at the machine, `plan` decides (pure: a topology in, a plan out), `bind` does it. Every
local rank makes the same plan from the same facts and takes its own share: no rank talks to another.

Why bind: a thread that the kernel moves to another core loses its caches, and on a machine of two sockets it
may lose its memory, which then lies behind the other socket. Sources: sched_setaffinity(2), set_mempolicy(2),
numa(7); torch's own `torch.backends.xeon.run_cpu` binds likewise, with numactl.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEM = Path("/sys/devices/system")
SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237, "riscv64": 237, "ppc64le": 261}
"""Numbers of the system call; libc has no function for it, and libnuma is not everywhere."""
MPOL_PREFERRED = 1
"""Memory comes from that node while it has some, then from others: MPOL_BIND would kill the process instead."""


@dataclass(frozen=True, slots=True, order=True)
class Core:
    """A physical core, with those of its hardware threads that this process may use."""

    node: int
    """NUMA node."""
    package: int
    """Socket."""
    number: int
    """Lowest logical CPU of the core: cores in this order lie side by side."""
    cpus: tuple[int, ...]
    """Logical CPUs (SMT siblings), those that are allowed."""


@dataclass(frozen=True, slots=True)
class Topology:
    """What this process may use of the machine."""

    cores: tuple[Core, ...]
    """Sorted by NUMA node, socket, number."""
    nodes: int
    """NUMA nodes of the machine, those outside this process's share too."""

    @property
    def cpus(self) -> int:
        """Logical CPUs that are allowed."""
        return sum(len(core.cpus) for core in self.cores)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the experiment asks for, and what Slurm has said."""

    binding: str = "auto"
    """`trainer.binding`: auto, none, cores, numa."""
    threads: int = 0
    """`trainer.threads_per_process`; 0: automatic."""
    interop: int = 0
    """`trainer.interop_threads`; 0: automatic."""
    slurm: bool = False
    """Whether this is the only run among the CPUs that Slurm gave: `cluster.kind` is slurm."""
    slurm_cpus: int | None = None
    """CPUs that Slurm gave them together ($SLURM_CPUS_PER_TASK), where it said so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One local rank's threads and place."""

    threads: int
    """Of one operation (torch.set_num_threads)."""
    interop: int
    """Of operations side by side (torch.set_num_interop_threads)."""
    cores: tuple[Core, ...]
    """This rank's own cores; none where nothing is bound."""
    memory_node: int | None
    """NUMA node that its memory shall come from; None: where it is touched first."""
    why: str
    """The reason, for the log."""
    warning: str | None = None
    """What the user should know of."""

    @property
    def cpus(self) -> tuple[int, ...]:
        """Logical CPUs of `cores`, ascending."""
        return tuple(sorted(cpu for core in self.cores for cpu in core.cpus))

    def describe(self) -> str:
        """One line: `4 threads (inter-op 4), bound to CPUs 0-3 (4 cores), NUMA node 0: …why…`."""
        words = f"{self.threads} thread{'s' * (self.threads != 1)} (inter-op {self.interop}), "
        if not self.cores:
            return f"{words}not bound: {self.why}"
        nodes = sorted({core.node for core in self.cores})
        many = "s" * (len(self.cores) != 1)
        place = (
            f"bound to CPU{'s' * (len(self.cpus) != 1)} {ranges(self.cpus)} ({len(self.cores)} core{many})"
        )
        return f"{words}{place}, NUMA node{'s' * (len(nodes) != 1)} {ranges(nodes)}: {self.why}"


def plan(topology: Topology, wish: Wish, ranks: int, rank: int, gpu_nodes: Sequence[int | None] = ()) -> Plan:
    """Threads and cores of local rank `rank` among `ranks`; on every rank from the same facts.

    Args:
        topology: what may be used.
        wish: what was asked for.
        ranks: workers on this machine that share it.
        rank: which of them.
        gpu_nodes: the NUMA node of each local rank's GPU; None where it can't be told, empty on CPUs.
    """
    given = min(topology.cpus, wish.slurm_cpus or topology.cpus)
    usable = min(len(topology.cores), given)
    threads = wish.threads or max(1, usable // ranks)
    interop = wish.interop or threads
    refusal, warning = _why_not(topology, wish, ranks)
    if refusal is not None:
        return Plan(
            threads=threads, interop=interop, cores=(), memory_node=None, why=refusal, warning=warning
        )
    share = shares(topology.cores, ranks, gpu_nodes)[rank]
    nodes = {core.node for core in share}
    asked = wish.binding if wish.binding != "auto" else "numa"
    memory = nodes.pop() if asked == "numa" and topology.nodes > 1 and len(nodes) == 1 else None
    why = [f"{len(topology.cores)} cores among {ranks} process{'es' * (ranks != 1)}"]
    why.append("asked for" if wish.binding != "auto" else "Slurm gave exactly these CPUs")
    if rank < len(gpu_nodes) and gpu_nodes[rank] is not None:
        near = all(core.node == gpu_nodes[rank] for core in share)
        why.append(f"its GPU is at node {gpu_nodes[rank]}" + ("" if near else ", which is full"))
    if asked == "numa":
        why.append(_about_memory(topology, memory))
    return Plan(threads=threads, interop=interop, cores=share, memory_node=memory, why="; ".join(why))


def _why_not(topology: Topology, wish: Wish, ranks: int) -> tuple[str | None, str | None]:
    """Why nothing is bound (None where it is), and a warning where that isn't as it should be."""
    cores = len(topology.cores)
    if wish.binding == "none":
        return "trainer.binding=none", None
    if wish.binding == "auto" and not wish.slurm:
        return "other runs may share this machine (trainer.binding=cores binds all the same)", None
    if wish.binding == "auto" and wish.slurm_cpus != topology.cpus:
        said = (
            "didn't say how many CPUs it gave" if wish.slurm_cpus is None else f"gave {wish.slurm_cpus} CPUs"
        )
        return f"Slurm {said} and confines to {topology.cpus}: which are this job's can't be told", None
    if ranks > cores:
        text = f"{ranks} processes share {cores} core{'s' * (cores != 1)}"
        return text, f"{text}: they take turns, none is bound; cluster.processes_per_node={cores} would fit"
    return None, None


def _about_memory(topology: Topology, memory: int | None) -> str:
    if topology.nodes == 1:
        return "one NUMA node, so no memory to bind"
    return (
        f"memory from node {memory}"
        if memory is not None
        else "share spans nodes, memory where first touched"
    )


def shares(cores: Sequence[Core], ranks: int, gpu_nodes: Sequence[int | None] = ()) -> list[tuple[Core, ...]]:
    """Equally large shares of neighbouring cores, one a rank, none on two nodes while that can be helped.

    What doesn't divide is left over: a rank with a core more would only wait for the others. Ranks with a
    GPU choose first, then the others in order; whoever finds no node with room takes what is left.
    """
    size = len(cores) // ranks
    assert size >= 1, "fewer cores than ranks: refused by plan()"
    free: dict[int, list[Core]] = {}
    for core in sorted(cores):
        free.setdefault(core.node, []).append(core)
    found: dict[int, tuple[Core, ...]] = {}

    def take(rank: int, nodes: Iterable[int]) -> None:
        for node in nodes:
            if rank not in found and len(free.get(node, ())) >= size:
                found[rank], free[node] = tuple(free[node][:size]), free[node][size:]

    for rank, node in enumerate(gpu_nodes[:ranks]):
        if node is not None:
            take(rank, [node])
    for rank in range(ranks):
        take(rank, sorted(free))
    left = [core for node in sorted(free) for core in free[node]]
    for rank in range(ranks):
        if rank not in found:
            found[rank], left = tuple(left[:size]), left[size:]
    return [found[rank] for rank in range(ranks)]


def read_topology(allowed: Collection[int], system: Path = SYSTEM) -> Topology:
    """The cores behind the logical CPUs `allowed`.

    Where sysfs says nothing of a CPU (a sandbox), it counts as a core of its own; without NUMA nodes in sysfs
    all is node 0.
    """
    node_of: dict[int, int] = {}
    nodes = 0
    for folder in sorted(system.glob("node/node[0-9]*")):
        cpus = _read(folder / "cpulist")
        nodes += cpus != ""  # a node may have memory and no CPUs
        node_of |= dict.fromkeys(numbers(cpus or ""), int(folder.name.removeprefix("node")))
    grouped: dict[tuple[int, ...], list[int]] = {}
    for cpu in sorted(allowed):
        topology = system / "cpu" / f"cpu{cpu}" / "topology"
        siblings = _read(topology / "thread_siblings_list") or str(cpu)
        grouped.setdefault(tuple(numbers(siblings)), []).append(cpu)
    cores = []
    for threads_of_core, usable in grouped.items():
        package = _read(system / "cpu" / f"cpu{usable[0]}" / "topology" / "physical_package_id")
        cores.append(Core(node_of.get(usable[0], 0), int(package or 0), min(threads_of_core), tuple(usable)))
    return Topology(tuple(sorted(cores)), max(1, nodes))


def gpu_node(pci_address: str, devices: Path = Path("/sys/bus/pci/devices")) -> int | None:
    """The NUMA node that a GPU hangs on; None where the machine doesn't say (-1 in virtual machines).

    Args:
        pci_address: `0000:3b:00.0`.
        devices: sysfs' folder of PCI devices.
    """
    text = _read(devices / pci_address.lower() / "numa_node")
    return int(text) if text and int(text) >= 0 else None


def gpu_nodes(ranks: int) -> list[int | None]:
    """The NUMA node of each local rank's GPU, rank i on GPU i; needs torch with CUDA.

    Where Slurm shows each process its own GPU only, the others' can't be told: then nobody chooses by it.
    """
    import torch

    if torch.cuda.device_count() < ranks:
        return [None] * ranks
    return [_pci_node(torch.cuda.get_device_properties(index)) for index in range(ranks)]


def _pci_node(gpu: Any) -> int | None:
    """From torch's properties of a GPU; versions of torch that don't tell its PCI address get None."""
    domain, bus, slot = (getattr(gpu, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
    if domain is None or bus is None or slot is None:
        return None
    return gpu_node(f"{domain:04x}:{bus:02x}:{slot:02x}.0")


def wish(
    binding: str, threads: int, interop: int, *, kind: str, environment: Mapping[str, str] = os.environ
) -> Wish:
    """What the experiment asks for and what Slurm has said in this process's environment.

    Args:
        binding: `trainer.binding`.
        threads: `trainer.threads_per_process`.
        interop: `trainer.interop_threads`.
        kind: `cluster.kind`: a local run inside a Slurm job (salloc) may not be the only one there.
        environment: where Slurm has put its words.
    """
    said = environment.get("SLURM_CPUS_PER_TASK", "")
    return Wish(
        binding=binding, threads=threads, interop=interop, slurm=kind == "slurm",
        slurm_cpus=int(said) if said.isdigit() else None,
    )  # fmt: skip


def bind(chosen: Plan) -> str | None:
    """Puts this process, with all threads that it has by now, onto its cores; later threads inherit it.

    Returns:
        What the kernel refused, as a warning; None where all was done.
    """
    if not chosen.cores:
        return None
    try:
        for task in os.listdir("/proc/self/task"):  # noqa: PTH208 (Path would make an object a thread)
            try:
                os.sched_setaffinity(int(task), chosen.cpus)
            except ProcessLookupError:
                continue  # the thread has just ended
    except OSError as error:
        return f"can't bind to CPUs {ranges(chosen.cpus)}: {error.strerror}"
    return None if chosen.memory_node is None else _prefer_memory(chosen.memory_node)


def _prefer_memory(node: int) -> str | None:
    """Memory policy of this thread, and of those that it starts: what is allocated from now on."""
    number = SET_MEMPOLICY.get(os.uname().machine)
    if number is None:
        return f"memory isn't bound: set_mempolicy is not known on {os.uname().machine}"
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    words = node // bits + 1
    mask = (ctypes.c_ulong * words)()
    mask[node // bits] = 1 << node % bits
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel reads one bit less than it is told (set_mempolicy(2), BUGS).
    if libc.syscall(number, MPOL_PREFERRED, mask, ctypes.c_ulong(words * bits + 1)) != 0:
        return f"memory isn't bound to NUMA node {node}: {os.strerror(ctypes.get_errno())}"
    return None


def numbers(text: str) -> list[int]:
    """`0-2,5` → 0, 1, 2, 5: sysfs' lists of CPUs."""
    found: list[int] = []
    for part in text.split(","):
        if part.strip():
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    return found


def ranges(values: Sequence[int]) -> str:
    """0, 1, 2, 5 → `0-2,5`."""
    pieces: list[list[int]] = []
    for value in values:
        if pieces and value == pieces[-1][1] + 1:
            pieces[-1][1] = value
        else:
            pieces.append([value, value])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in pieces)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None
