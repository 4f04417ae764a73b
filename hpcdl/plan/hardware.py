"""What an experiment will run on: its device, how much memory a rank may have of it, and what connects the ranks.

In this order: what the config says (`cluster.gpu`, `cluster.gpu_mem_gb`, `cluster.mem_gb`, what it says of the
partition), what Slurm says (hpcdl.plan.nodes), on this machine what it says itself. `Hardware.sources` tells of each
figure where it is from; what nobody says stays unknown.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpcdl.errors import Fault, nearest_name
from hpcdl.plan import devices, free, nodes
from hpcdl.plan.records import Device, Hardware, Links
from hpcdl.spec import ClusterSpec, ExperimentSpec, PartitionLimits

GIB = 2**30
ASSUMED = "A100"
"""Whose rates stand in where nobody says which GPU it is; its memory is never taken for theirs."""
_ANSWER_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A figure and who says so."""

    value: int | None
    """None: nobody does."""
    source: str


def of(spec: ExperimentSpec, *, ask: bool = True) -> Hardware:
    """What the experiment is planned for.

    Args:
        spec: the experiment.
        ask: whether Slurm, and this machine's driver, may be asked; each is asked once a process.
    """
    cluster = spec.cluster
    ask = ask and cluster.kind != "kubernetes"  # a pod has what the config says
    device, links, sources = (_gpu if on_gpus(cluster) else _cpu)(spec, ask)
    return Hardware(
        device=device,
        links=links,
        ranks_per_node=cluster.processes_per_node,
        nodes=cluster.nodes,
        sources=sources,
    )


def on_gpus(cluster: ClusterSpec) -> bool:
    """Whether ranks compute on GPUs."""
    return bool(cluster.gpus_per_node or nodes.gpus(cluster.gres))


def faults(cluster: ClusterSpec) -> Iterator[Fault]:
    """Names of GPUs that no plan can be made for."""
    named = [("cluster", cluster.gpu, cluster.gpu_mem_gb)]
    named += [
        (f"cluster.partitions.{n}", each.gpu, each.gpu_mem_gb) for n, each in cluster.partitions.items()
    ]
    names = [line.name for line in devices.GPUS]
    for where, name, memory in named:
        if name is None or memory is not None or devices.gpu(name) or nodes.slice_bytes(name):
            continue
        near = nearest_name(name.upper(), names)
        yield Fault(
            key=f"{where}.gpu",
            value=name,
            problem="the planner knows no such GPU",
            allowed=", ".join(names) + f"; any other with {where}.gpu_mem_gb",
            nearest=near,
            fix=f"{where}.gpu={near.lower().replace(' ', '_')}"
            if near
            else f"{where}.gpu_mem_gb=…, its memory in GiB",
        )


# --- GPUs -----------------------------------------------------------------------------------------------------


def _gpu(spec: ExperimentSpec, ask: bool) -> tuple[Device, Links, dict[str, str]]:
    cluster = spec.cluster
    name, source, memory = _which(cluster, ask)
    line = devices.gpu(name) if name else None
    if memory.value is None and name and (part := nodes.slice_bytes(name)):
        memory = Known(value=part, source=f"{name} is a slice of a GPU")
    if memory.value is None and line is not None:
        memory = Known(value=line.mib * devices.MIB, source=f"table of devices: {line.name}")
    sources = {"device": source, "memory": memory.source}
    if line is None:
        line = devices.gpu(ASSUMED)
        assert line is not None
        sources["rates"] = f"assumed: those of {ASSUMED}, since nobody says which GPU it is (cluster.gpu=…)"
        device = dataclasses.replace(devices.of_gpu(line), name=name or "GPU", memory_bytes=memory.value)
    else:
        sources["rates"] = f"table of devices: {line.name}"
        device = devices.of_gpu(line, memory.value)
    return device, devices.links_of(line), sources


def _which(cluster: ClusterSpec, ask: bool) -> tuple[str | None, str, Known]:
    """The GPU's name, who says so, and its memory where somebody says."""
    limits = [(name, cluster.partitions[name]) for name in _partitions(cluster) if name in cluster.partitions]
    memory = _gpu_memory(cluster, limits)
    name, source = cluster.gpu, "cluster.gpu"
    if name is None:
        name, source = next(
            ((kind, "cluster.gres") for kind, _ in nodes.gpus(cluster.gres) if kind), (None, "")
        )
    if name is None and limits:
        told = [(each.gpu, f"cluster.partitions.{part}.gpu") for part, each in limits if each.gpu]
        name, source = min(told, key=lambda pair: _size(pair[0]), default=(None, ""))
    if name is None and cluster.kind == "local" and ask:
        name, found = _this_machines()
        source, memory = "nvidia-smi", memory if memory.value is not None else found
    elif name is None and ask:
        kinds, why = _kinds(cluster)
        types = {kind for node in kinds for kind, _ in node.gpus if kind}
        name = min(types, key=lambda each: (_size(each), each), default=None)
        source = "sinfo (gres types)" if name else why or "Slurm names no type of GPU (gres)"
    if name is None:
        source = f"nobody says which GPU it is: {source or 'not asked'}"
    elif cluster.kind == "local" and ask and memory.value is None:
        memory = _this_machines()[1]
    if name and memory.value is not None:  # a100 with 80 GiB is another line of the table
        longer = f"{name} {memory.value / GIB:.0f}gb"
        name = longer if _is_longer(longer, name) else name
    return name, source, memory


def _is_longer(longer: str, name: str) -> bool:
    found, plain = devices.gpu(longer), devices.gpu(name)
    return found is not None and found is not plain


def _size(name: str) -> int:
    """To plan for the smallest of several."""
    line = devices.gpu(name)
    return nodes.slice_bytes(name) or (line.mib * devices.MIB if line else 0)


def _gpu_memory(cluster: ClusterSpec, limits: Sequence[tuple[str, PartitionLimits]]) -> Known:
    if cluster.gpu_mem_gb is not None:
        return Known(value=round(cluster.gpu_mem_gb * GIB), source="cluster.gpu_mem_gb")
    told = [(each.gpu_mem_gb, name) for name, each in limits if each.gpu_mem_gb is not None]
    if told and cluster.gpu is None:
        size, name = min(told)
        return Known(value=round(size * GIB), source=f"cluster.partitions.{name}.gpu_mem_gb")
    return Known(
        value=None, source="nobody says how much memory a GPU has: cluster.gpu=… or cluster.gpu_mem_gb=…"
    )


@functools.cache
def _this_machines() -> tuple[str | None, Known]:
    """The smallest GPU here and what is free of it, as nvidia-smi has it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if "MIG" in visible:
        return None, Known(
            value=None, source="a MIG slice, whose memory isn't asked for: cluster.gpu_mem_gb=…"
        )
    if shutil.which("nvidia-smi") is None:
        return None, Known(value=None, source="there is no nvidia-smi on this machine")
    chosen = ["-i", visible] if visible else []
    query = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,memory.used",
        "--format=csv,noheader,nounits",
        *chosen,
    ]
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, errors="replace", timeout=_ANSWER_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, Known(value=None, source=f"nvidia-smi gave no answer ({type(error).__name__})")
    rows = re.findall(r"^(.+), (\d+), (\d+)$", done.stdout, re.MULTILINE)
    if not rows:
        return None, Known(value=None, source="nvidia-smi names no GPU")
    name, total, used = min(rows, key=lambda row: int(row[1]) - int(row[2]))
    left = (int(total) - int(used)) * devices.MIB
    return name, Known(value=left, source=f"nvidia-smi: free now of {int(total) / 1024:.1f} GiB")


# --- CPUs -----------------------------------------------------------------------------------------------------


def _cpu(spec: ExperimentSpec, ask: bool) -> tuple[Device, Links, dict[str, str]]:
    cluster = spec.cluster
    if cluster.kind == "local":
        memory, cpu = _free_here(cluster), devices.read_cpu()
        rates = f"this machine's processor: {cpu.name}, {cpu.cores} cores"
    else:
        memory, cpu = _node_memory(cluster, ask), devices.read_cpu(cores=cluster.cpus_per_node)
        rates = f"assumed: cores like this machine's, {cpu.name}, {cpu.cores} of them a node"
    threads = spec.trainer.threads_per_process
    share = None if memory.value is None else memory.value // cluster.processes_per_node
    device = devices.of_cpu(
        cpu, threads=threads, ranks_per_node=cluster.processes_per_node, memory_bytes=share
    )
    divided = f", shared by {cluster.processes_per_node}" if cluster.processes_per_node > 1 else ""
    whole = f"{memory.source}{divided if memory.value is not None else ''}"
    return device, devices.LOOPBACK, {"device": "no GPU is asked for", "memory": whole, "rates": rates}


def _free_here(cluster: ClusterSpec) -> Known:
    """What this machine has left, or less where the config says so."""
    found = free.here()
    total = f" of {found.limit_bytes / GIB:.1f} GiB" if found.limit_bytes else ""
    known = Known(value=found.available_bytes, source=f"free now on this machine{total}")
    if cluster.mem_gb is None:
        return known
    said = Known(value=round(cluster.mem_gb * GIB), source="cluster.mem_gb")
    return said if known.value is None or (said.value or 0) <= known.value else known


def _node_memory(cluster: ClusterSpec, ask: bool) -> Known:
    """What Slurm will give the job on a node."""
    if cluster.mem_gb is not None:
        return Known(value=round(cluster.mem_gb * GIB), source="cluster.mem_gb")
    known = [whole_node(cluster, ask=ask)]
    if ask:
        partitions = {kind.partition for kind in _kinds(cluster)[0]} or set(_partitions(cluster))
        known += _default_memory(cluster, partitions)
    said = [each for each in known if each.value is not None]
    return min(said, key=lambda each: each.value or 0) if said else known[0]


def whole_node(cluster: ClusterSpec, *, ask: bool = True) -> Known:
    """All the memory of the smallest node that the job may get, whatever of it was asked for; here what is free."""
    if cluster.kind == "local":
        return Known(value=free.here().available_bytes, source="free now on this machine")
    told = [
        (limits.mem_gb, name)
        for name in _partitions(cluster)
        if (limits := cluster.partitions.get(name)) is not None and limits.mem_gb is not None
    ]
    if told:
        size, name = min(told)
        return Known(value=round(size * GIB), source=f"cluster.partitions.{name}.mem_gb")
    if cluster.kind == "kubernetes":
        return Known(value=None, source="nobody says how much memory a pod has: cluster.mem_gb=…")
    kinds, why = _kinds(cluster) if ask else ([], "not asked")
    if kinds:
        least = min(kinds, key=lambda kind: kind.memory_bytes)
        return Known(value=least.memory_bytes, source=f"RealMemory of {least.partition}'s nodes (sinfo)")
    hint = "cluster.mem_gb=…, or cluster.partitions"
    return Known(value=None, source=f"nobody says how much memory a node has ({why}): {hint}")


def _default_memory(cluster: ClusterSpec, partitions: set[str]) -> Iterator[Known]:
    """What a job that doesn't ask for memory gets."""
    said = nodes.defaults()
    for name in sorted(partitions):
        default = said.get(name, said.get("", nodes.Default()))
        if default.per_node is not None:
            yield Known(
                value=default.per_node, source=f"DefMemPerNode of {name}: cluster.mem_gb asks for more"
            )
        elif default.per_cpu is not None:
            size = default.per_cpu * cluster.cpus_per_node
            yield Known(value=size, source=f"DefMemPerCPU of {name}: cluster.mem_gb asks for more")


# --- nodes ----------------------------------------------------------------------------------------------------


def _partitions(cluster: ClusterSpec) -> list[str]:
    return cluster.partition.split(",") if cluster.partition else []


def _kinds(cluster: ClusterSpec) -> tuple[list[nodes.NodeKind], str]:
    """Kinds of nodes that the job may get, and why there are none."""
    said = nodes.ask()
    named = _partitions(cluster)
    own = [kind for kind in said.kinds if (kind.partition in named if named else kind.default)]
    wanted = cluster.constraint or ""
    if re.fullmatch(r"[\w.-]+", wanted):
        own = [kind for kind in own if wanted in kind.features] or own
    if on_gpus(cluster):
        own = [kind for kind in own if kind.gpus]
    enough = [kind for kind in own if kind.cpus >= cluster.cpus_per_node]
    why = (
        said.why_none or f"sinfo knows no node of partition {cluster.partition or '(the default)'} with that"
    )
    return enough or own, "" if own else why
