"""Let the planner choose: degrees, micro-batches, recomputation and more, for this model on this cluster.

Resolved where a launch is composed (hpcdl.launch.auto): run directories and compute nodes see the strategy that was
chosen, with its degrees, and the run's id is that of the chosen experiment. How it is chosen: hpcdl.plan.search.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from hpcdl.errors import ConfigError, Fault
from hpcdl.spec import ExperimentSpec, ParallelSpec
from hpcdl.spec.parallel import DIMENSIONS
from hpcdl.spec.traffic import Sent, Sizes

if TYPE_CHECKING:
    from hpcdl.distributed.engine import Engine
    from hpcdl.distributed.mesh import Grid
    from hpcdl.distributed.parallelize import Job

ALLOWED: dict[str, tuple[str, ...]] = {
    "micro_batch_size": ("trainer.micro_batch_size",),
    "checkpointing": ("trainer.activation_checkpointing",),
    "offload": ("trainer.activation_offload", "parallel.cpu_offload"),
    "quantization": ("quant",),
    "local_sgd": (),
    "diloco": (),
    "param_server": (),
    "hogwild": (),
}
"""What may be searched besides the mesh, and the keys that it sets."""
OFF_THE_MESH = ("local_sgd", "diloco", "param_server", "hogwild")
"""Strategies that are chosen only where `allow` names them: but for the parameter server they change what is learnt."""
Allowed = Literal[
    "micro_batch_size",
    "checkpointing",
    "offload",
    "quantization",
    "local_sgd",
    "diloco",
    "param_server",
    "hogwild",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(ParallelSpec):
    """A degree of -1 is searched, any other stays."""

    OPEN = True
    """The degrees are not known yet: rules about them wait until they are."""
    dp_shard: Annotated[int, Ge(-1)] = -1
    """Ranks over which parameters are sharded; -1: searched."""
    cp: Annotated[int, Ge(-1)] = -1
    """Context parallel; -1: searched."""
    tp: Annotated[int, Ge(-1)] = -1
    """Tensor parallel; -1: searched, inside a node unless nothing else fits."""
    pp: Annotated[int, Ge(-1)] = -1
    """Pipeline parallel; -1: searched."""
    allow: tuple[Allowed, ...] = ("micro_batch_size", "checkpointing", "offload")
    """What may be chosen besides degrees, pipeline schedules and resharding. What is typed on the command line stays
    as typed in any case."""
    memory_gb: Annotated[float, Gt(0)] | None = None
    """GiB that a rank may hold; null: what its device has (or its share of the node's memory)."""
    memory_share: Annotated[float, Interval(gt=0, le=1)] = 0.9
    """The share of that which the choice may fill: a prediction is no measurement."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """Degrees that are given must be possible for some choice of the others."""
    world, product = spec.cluster.world_size, 1
    for name in DIMENSIONS:
        degree = int(getattr(config, name))
        product *= degree if degree > 0 else 1
    if world % product:
        given = [f"{name} {getattr(config, name)}" for name in DIMENSIONS if getattr(config, name) > 0]
        yield Fault(
            key=f"parallel.{given[-1].split()[0]}",
            value=given[-1].split()[1],
            problem=f"{' × '.join(given)} = {product} does not divide the {world} processes of the cluster section",
            allowed=f"-1 (searched), or degrees whose product divides {world}",
            nearest="-1",
            fix=f"parallel.{given[-1].split()[0]}=-1",
        )


def traffic(config: Config, sizes: Sizes) -> Iterator[Sent]:
    """None that is known: it is the chosen strategy's."""
    return iter(())


def build(config: Config, model: Any, grid: Grid, job: Job) -> Engine:
    """There is nothing to build: a launch chooses before it writes spec.yaml."""
    raise ConfigError(
        [
            Fault(
                key="parallel.name",
                value="auto",
                problem="is chosen by hpcdl launch, before a run's spec.yaml is written; this one was written by hand",
                allowed="a strategy with its degrees",
                fix="hpcdl launch … parallel=auto",
            )
        ]
    )
