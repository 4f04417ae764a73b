"""Plans with round figures, for tests of what is said of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hpcdl.plan import devices
from hpcdl.plan.records import Hardware, Plan, RankMemory, StepTime, Traffic

GIB = 2**30
SIZES = {"weights": 4, "gradients": 4, "optimizer": 8, "activations": 3, "logits": 1}
"""GiB: 20 in all."""


def rank(stage: int = 0, *, share: float = 1.0, ranks: int = 8) -> RankMemory:
    """A stage with `share` of SIZES, and 1 GiB beside tensors."""
    sizes = {name: int(share * size * GIB) for name, size in SIZES.items()}
    return RankMemory(
        stage=stage,
        ranks=ranks,
        bytes={**sizes, "activations": 2 * sizes["activations"]},
        at_peak=sizes,
        tensors=sum(sizes.values()),
        moment="backward",
        allocator=GIB // 2,
        runtime=GIB // 2,
    )


def hardware(memory_gib: float | None = 24.0, name: str = "h100") -> Hardware:
    """Two nodes with four GPUs each."""
    line = devices.gpu(name)
    assert line is not None
    device = replace(devices.of_gpu(line), memory_bytes=None if memory_gib is None else int(memory_gib * GIB))
    return Hardware(
        device=device,
        links=devices.links_of(line),
        ranks_per_node=4,
        nodes=2,
        sources={"memory": "cluster.gpu_mem_gb", "rates": f"table of devices: {line.name}"},
    )


def step(seconds: float = 2.0) -> StepTime:
    """A step with one kind of communication."""
    gradients = Traffic(
        what="all-reduce of gradients",
        dimension="dp_replicate",
        ranks=8,
        calls=4,
        bytes=3 * GIB,
        seconds=0.5,
        hidden=0.4,
    )
    return StepTime(
        compute_s=seconds - 0.3,
        memory_s=0.1,
        communication_s=0.1,
        bubble_s=0.0,
        optimizer_s=0.05,
        overhead_s=0.05,
        tokens=16384,
        mfu=0.38,
        traffic=(gradients,),
    )


def plan(**changes: Any) -> Plan:
    """21 GiB of 24 a process, 2 s a step."""
    whole = Plan(
        memory=(rank(),),
        time=step(),
        unknown=(),
        hardware=hardware(),
        world_size=8,
        max_steps=100,
        checkpoint_bytes=90 * GIB,
        checkpoints=3,
        run_s=250.0,
    )
    return replace(whole, **changes)
