"""Threads and cores: plans for machines written down here, and one process that really is bound."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcdl.worker import threads
from hpcdl.worker.threads import Core, Topology, Wish
from tests.worker.conftest import Workers

BOUND = Wish(binding="numa")


def machine(sockets: int, cores: int, smt: int) -> Topology:
    """Linux numbers first threads of all cores, then their siblings; a NUMA node a socket."""
    total = sockets * cores
    return Topology(
        tuple(
            Core(i // cores, i // cores, i, tuple(i + total * thread for thread in range(smt)))
            for i in range(total)
        ),
        sockets,
    )


TWO_SOCKETS = machine(2, 4, 2)


def plans(
    topology: Topology, wish: Wish, ranks: int, gpus: tuple[int | None, ...] = ()
) -> list[threads.Plan]:
    return [threads.plan(topology, wish, ranks, rank, gpus) for rank in range(ranks)]


def own_cpus(made: list[threads.Plan]) -> list[tuple[int, ...]]:
    """Each rank's CPUs, after checking that no core is two ranks'."""
    cores = [core for p in made for core in p.cores]
    assert len(cores) == len(set(cores))
    return [p.cpus for p in made]


# --- plans -----------------------------------------------------------------------------------------------


def test_a_core_each() -> None:
    made = plans(machine(1, 2, 1), BOUND, 2)
    assert own_cpus(made) == [(0,), (1,)]
    assert [p.threads for p in made] == [1, 1]
    assert made[0].memory_node is None
    assert made[1].describe() == (
        "1 thread (inter-op 1), bound to CPU 1 (1 core), NUMA node 0: 2 cores among 2 processes; asked for;"
        " one NUMA node, so no memory to bind"
    )


@pytest.mark.parametrize(
    ("ranks", "cpus", "memory"),
    [
        (1, [tuple(range(16))], [None]),
        (2, [(0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)], [0, 1]),
        (3, [(0, 1, 8, 9), (2, 3, 10, 11), (4, 5, 12, 13)], [0, 0, 1]),
        (8, [(i, i + 8) for i in range(8)], [0, 0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_two_sockets_with_siblings(ranks: int, cpus: list[tuple[int, ...]], memory: list[int | None]) -> None:
    """A thread a physical core; siblings stay with their core; no share on two sockets but the whole."""
    made = plans(TWO_SOCKETS, BOUND, ranks)
    assert own_cpus(made) == cpus
    assert [p.memory_node for p in made] == memory
    assert [p.threads for p in made] == [8 // ranks] * ranks


def test_a_share_lies_on_two_nodes_only_where_none_has_room() -> None:
    made = plans(machine(2, 3, 1), BOUND, 3)
    assert own_cpus(made) == [(0, 1), (3, 4), (2, 5)]
    assert [p.memory_node for p in made] == [0, 1, None]
    assert "share spans nodes" in made[2].why and "NUMA nodes 0-1" in made[2].describe()


def test_a_rank_keeps_near_its_gpu() -> None:
    made = plans(TWO_SOCKETS, BOUND, 4, (1, 1, 1, None))
    assert [p.memory_node for p in made] == [1, 1, 0, 0]
    assert own_cpus(made) == [(4, 5, 12, 13), (6, 7, 14, 15), (0, 1, 8, 9), (2, 3, 10, 11)]
    assert "its GPU is at node 1;" in made[0].why
    assert "its GPU is at node 1, which is full" in made[2].why
    assert "GPU" not in made[3].why


def test_more_processes_than_cores() -> None:
    made = plans(machine(1, 2, 2), BOUND, 3)
    assert [p.cores for p in made] == [()] * 3
    assert [p.threads for p in made] == [1] * 3
    assert made[0].warning == (
        "3 processes share 2 cores: they take turns, none is bound; cluster.processes_per_node=2 would fit"
    )


def test_cores_without_memory() -> None:
    made = plans(TWO_SOCKETS, Wish(binding="cores"), 2)
    assert [p.memory_node for p in made] == [None, None]
    assert own_cpus(made)[1] == (4, 5, 6, 7, 12, 13, 14, 15)


def test_threads_are_the_users_word() -> None:
    made = plans(TWO_SOCKETS, Wish(binding="cores", threads=3, interop=2), 2)
    assert [(p.threads, p.interop, len(p.cores)) for p in made] == [(3, 2, 4)] * 2


@pytest.mark.parametrize(
    ("wish", "cpus", "why"),
    [
        (Wish(), [(), ()], "other runs may share this machine"),
        (Wish(binding="none", slurm=True, slurm_cpus=2), [(), ()], "trainer.binding=none"),
        (Wish(slurm=True, slurm_cpus=2), [(0,), (1,)], "Slurm gave exactly these CPUs"),
        (Wish(slurm=True, slurm_cpus=1), [(), ()], "Slurm gave 1 CPUs and confines to 2"),
        (Wish(slurm=True, slurm_cpus=4), [(), ()], "Slurm gave 4 CPUs and confines to 2"),
        (Wish(slurm=True), [(), ()], "Slurm didn't say how many CPUs it gave and confines to 2"),
    ],
)
def test_binding_by_itself_only_where_the_cpus_are_the_jobs_own(
    wish: Wish, cpus: list[tuple[int, ...]], why: str
) -> None:
    made = plans(machine(1, 2, 1), wish, 2)
    assert own_cpus(made) == cpus
    assert why in made[0].why and made[0].warning is None


def test_what_slurm_gave_limits_the_threads() -> None:
    """A cluster that doesn't confine tasks."""
    made = threads.plan(machine(1, 16, 1), Wish(slurm=True, slurm_cpus=6), 2, 0)
    assert (made.threads, made.cores) == (3, ())


def test_several_local_runs_may_be_in_one_slurm_job() -> None:
    """As in salloc: Slurm's number limits the threads, but nobody is bound by itself."""
    job = {"SLURM_CPUS_PER_TASK": "4"}
    batch = threads.wish("auto", 0, 0, kind="slurm", environment=job)
    assert (batch.slurm, batch.slurm_cpus) == (True, 4)
    inside = threads.wish("auto", 0, 0, kind="local", environment=job)
    assert (inside.slurm, inside.slurm_cpus) == (False, 4)


# --- the machine -----------------------------------------------------------------------------------------


def write_system(root: Path, topology: Topology) -> Path:
    """sysfs as Linux shows that machine."""
    cpus: dict[int, list[int]] = {}
    for core in topology.cores:
        cpus.setdefault(core.node, []).extend(core.cpus)
        for cpu in core.cpus:
            folder = root / "cpu" / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(threads.ranges(sorted(core.cpus)) + "\n")
            (folder / "physical_package_id").write_text(f"{core.package}\n")
    for node, members in cpus.items():
        (root / "node" / f"node{node}").mkdir(parents=True)
        (root / "node" / f"node{node}" / "cpulist").write_text(threads.ranges(sorted(members)) + "\n")
    return root


def test_sysfs_there_and_back(tmp_path: Path) -> None:
    system = write_system(tmp_path, TWO_SOCKETS)
    (system / "node" / "node2").mkdir()
    (system / "node" / "node2" / "cpulist").write_text("\n")  # memory without CPUs
    assert threads.read_topology(range(16), system) == TWO_SOCKETS


def test_a_cpuset_with_holes(tmp_path: Path) -> None:
    """CPUs 1 and 9 are one core, of 3 only one thread is allowed: 4 cores of two sockets remain."""
    system = write_system(tmp_path, TWO_SOCKETS)
    made = plans(threads.read_topology({1, 3, 6, 7, 9, 14, 15}, system), BOUND, 2)
    assert own_cpus(made) == [(1, 3, 9), (6, 7, 14, 15)]
    assert [p.threads for p in made] == [2, 2]
    assert [p.memory_node for p in made] == [0, 1]


def test_a_machine_that_says_nothing(tmp_path: Path) -> None:
    assert threads.read_topology({2, 5}, tmp_path) == Topology((Core(0, 0, 2, (2,)), Core(0, 0, 5, (5,))), 1)


def test_the_node_of_a_gpu(tmp_path: Path) -> None:
    for address, text in (("0000:3b:00.0", "1\n"), ("0000:af:00.0", "-1\n")):
        (tmp_path / address).mkdir()
        (tmp_path / address / "numa_node").write_text(text)
    nodes = [
        threads.gpu_node(address, tmp_path) for address in ("0000:3B:00.0", "0000:AF:00.0", "0000:00:00.0")
    ]
    assert nodes == [1, None, None]


def test_lists_of_cpus() -> None:
    assert threads.numbers("0-2,5,7-8\n") == [0, 1, 2, 5, 7, 8]
    assert threads.ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert threads.numbers("") == []


REALLY_BOUND = """
import json, os, sys, threading
from hpcdl.worker import threads
over = threading.Event()
running = threading.Thread(target=over.wait, daemon=True)
running.start()
node = int(sys.argv[2])
cpu = int(sys.argv[1])
refused = threads.bind(threads.Plan(
    threads=1, interop=1, cores=(threads.Core(node, 0, cpu, (cpu,)),), memory_node=node, why=""))
later = []
started = threading.Thread(target=lambda: later.append(sorted(os.sched_getaffinity(0))))
started.start(); started.join()
print(json.dumps({
    "refused": refused, "own": sorted(os.sched_getaffinity(0)), "later": later[0],
    "running": sorted(os.sched_getaffinity(running.native_id)),
    "policy": open("/proc/self/numa_maps").readline().split()[1] if os.path.exists("/proc/self/numa_maps") else None,
}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sched_setaffinity is Linux's")
def test_a_process_really_is_bound() -> None:
    """All its threads: those that run already and those that come; and its memory, where the kernel allows."""
    cpu = max(os.sched_getaffinity(0))
    (core,) = threads.read_topology({cpu}).cores
    done = subprocess.run(
        [sys.executable, "-c", REALLY_BOUND, str(cpu), str(core.node)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = json.loads(done.stdout)
    assert said["own"] == said["later"] == said["running"] == [cpu]
    if said["refused"] is None and said["policy"] is not None:
        assert said["policy"] == f"prefer:{core.node}"
    elif said["refused"] is not None:  # a container without CAP_SYS_NICE
        assert "memory isn't bound" in said["refused"]


def test_cpus_that_are_not_there_are_said() -> None:
    missing = Core(0, 0, 10_000, (10_000,))
    refused = threads.bind(threads.Plan(threads=1, interop=1, cores=(missing,), memory_node=None, why=""))
    assert refused == "can't bind to CPUs 10000: Invalid argument"


@pytest.mark.torch
def test_workers_tell_their_threads_and_cores(workers: Workers) -> None:
    ranks = 2 if len(os.sched_getaffinity(0)) > 1 else 1
    finished = workers.go(
        workers.make(trainer__binding="numa", trainer__interop_threads=3, trainer__max_steps=1), ranks
    )
    shares = threads.shares(threads.read_topology(os.sched_getaffinity(0)).cores, ranks)
    for rank, share in enumerate(shares):
        (line,) = (text for text in finished.log.splitlines() if f"rank {rank} of {ranks}" in text)
        assert "1 thread (inter-op 3), bound to CPU" in line and f"({len(share)} core" in line
    plain = workers.go(workers.make(trainer__max_steps=1))
    assert "not bound: other runs may share this machine" in plain.log
