"""Distributed data parallel: every rank holds the whole model; gradients are averaged in buckets.

Source: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, ParallelSpec

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(ParallelSpec):
    """DDP's own keys."""

    bucket_cap_mb: Annotated[int, Ge(1)] = 25
    """Size of a gradient bucket, in MiB."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """DDP only replicates: every other degree must be 1."""
    for degree in ("dp_shard", "cp", "tp", "pp"):
        value = getattr(config, degree)
        if value != 1:
            yield Fault(
                key=f"parallel.{degree}",
                value=str(value),
                problem="ddp replicates the model and can't split it",
                allowed="1",
                fix=f"parallel.{degree}=1",
            )


def apply(config: Config, model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Wraps `model` in DistributedDataParallel over the mesh's `dp_replicate` dimension.

    Nothing is broadcast: every rank has loaded the same weights (the worker checks it), and a causal
    language model's buffers are constants. DDP would send the frozen base of LoRA over the network too.
    """
    import warnings

    from torch.nn.parallel import DistributedDataParallel

    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers; 2.11 and 2.12 don't know the new name yet.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            model,
            process_group=mesh["dp_replicate"].get_group(),
            bucket_cap_mb=config.bucket_cap_mb,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
            init_sync=False,
        )
