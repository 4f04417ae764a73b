"""One process among many: its ranks, device, threads, and the process group it joins."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdl.errors import HpcdlError
from hpcdl.spec import ExperimentSpec
from hpcdl.worker import threads

if TYPE_CHECKING:
    import torch

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """Where this process stands among all workers, as torchrun told it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: str
    """Host name."""
    attempt: str
    """`<attempt>.<requeue>`, from $HPCDL_TRY."""
    restart: int
    """Times torchrun has started all workers anew in this try."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what is written once a run."""
        return self.rank == 0


def from_environment() -> Process:
    """This process's place; without torchrun a world of one."""
    env = os.environ
    return Process(
        rank=int(env.get("RANK", "0")),
        world_size=int(env.get("WORLD_SIZE", "1")),
        local_rank=int(env.get("LOCAL_RANK", "0")),
        local_world_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
        node=env.get("SLURMD_NODENAME") or os.uname().nodename.split(".")[0],
        attempt=env.get("HPCDL_TRY", "0.0"),
        restart=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def die_with_parent() -> None:
    """Has the kernel kill this process when torchrun dies, so that no orphan keeps a GPU or a core.

    Linux only (prctl(2), PR_SET_PDEATHSIG). Does nothing outside torchrun.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    kill_with_parent()
    if os.getppid() != parent:
        os._exit(1)  # torchrun died before the call above, so the kernel won't tell


def one_output() -> None:
    """Sends standard error where standard output goes, under torchrun: one file, in the order of what was printed.

    torchrun reads the two from files of their own, ten times a second: a traceback would stand before the words that
    led to it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        os.dup2(1, 2)


def kill_with_parent() -> None:
    """Asks the kernel for SIGKILL when this process's parent dies (prctl(2), PR_SET_PDEATHSIG; Linux only)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def set_threads(spec: ExperimentSpec, who: Process, device: torch.device) -> threads.Plan:
    """Plans and sets this process's CPU threads and cores (torchrun's OMP_NUM_THREADS=1 is overruled).

    Before torch's first parallel work: its pools take the place and the memory policy of the thread that
    starts them, and the number of inter-op threads can't change later.
    """
    import torch

    trainer, ranks = spec.trainer, who.local_world_size
    chosen = threads.plan(
        threads.read_topology(os.sched_getaffinity(0)),
        threads.wish(
            trainer.binding, trainer.threads_per_process, trainer.interop_threads, kind=spec.cluster.kind
        ),
        ranks,
        who.local_rank,
        threads.gpu_nodes(ranks) if device.type == "cuda" else (),
    )
    refused = threads.bind(chosen)
    torch.set_num_threads(chosen.threads)
    if torch.get_num_interop_threads() != chosen.interop:
        torch.set_num_interop_threads(chosen.interop)
    return chosen if refused is None else replace(chosen, warning=refused)


def choose_device(spec: ExperimentSpec, who: Process) -> torch.device:
    """The GPU of this local rank where the experiment asks for GPUs, else the CPU.

    `gpus_per_node` asks for GPUs. A raw `gres` only asks Slurm: with it, GPUs are used if there are any.

    Raises:
        HpcdlError: GPUs were asked for and aren't there, or fewer than processes.
    """
    import torch

    asked = spec.cluster.gpus_per_node
    by_gres = (spec.cluster.gres or "").startswith("gpu") and torch.cuda.is_available()
    if not asked and not by_gres:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise HpcdlError(
            f"cluster.gpus_per_node={asked}, but torch {torch.__version__} sees no GPU on {who.node}"
            f" (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}):"
            " install a CUDA build of torch there, or train on the CPU with cluster.gpus_per_node=0"
        )
    seen = torch.cuda.device_count()
    if seen == 1:  # Slurm's --gpus-per-task shows each process its own GPU only
        index = 0
    elif who.local_world_size > seen:
        raise HpcdlError(
            f"{who.local_world_size} processes on {who.node}, which shows {seen} GPUs: one GPU a process;"
            f" cluster.processes_per_node={seen}"
        )
    else:
        index = who.local_rank
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def bf16_is_slow(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU has no bf16 instructions: torch then emulates them, 3 to 5 times slower than fp32.

    x86 only; other machines are not judged.
    """
    if device.type != "cpu" or os.uname().machine != "x86_64":
        return False
    try:
        flags = cpuinfo.read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"} & set(flags)


def join(who: Process, device: torch.device) -> None:
    """Joins the process group: gloo for CPU tensors, nccl for CUDA's.

    Without torchrun's rendezvous the group is this process alone.
    """
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    if "MASTER_ADDR" in os.environ:
        store = own_store(who)
        dist.init_process_group(
            backend, store=store, rank=who.rank, world_size=who.world_size, device_id=device_id
        )
        return
    alone = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=alone, rank=0, world_size=1, device_id=device_id)


def own_store(who: Process) -> Any:
    """Torchrun's store; on one node under names of this restart's own.

    torchrun (torch 2.13) keeps one store for all its restarts in place and gives its workers no names of their own. A
    rank that looks before another has written finds that one's address in the restart before, where nobody listens any
    more: gloo then fails («Connection refused»), or waits for half an hour. With several nodes, where each agent counts
    only its own restarts, the launcher has torchrun make a new store for each (hpcdl.launch.torchrun.environment).
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://"))
    one_node = who.world_size == who.local_world_size
    return PrefixStore(f"restart-{who.restart}", store) if one_node else store


def leave() -> None:
    """Leaves the process group together: gloo aborts now and then where a rank goes before the others."""
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
