"""Rules of the ranks: degrees and processes, the batch and who shares it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hpcdl.errors import Fault
from hpcdl.spec import ClusterSpec, ParallelSpec, TrainerSpec
from hpcdl.spec.parallel import DIMENSIONS, ParallelDims


def degrees_count_ranks(parallel: ParallelSpec) -> Iterator[Fault]:
    """No rank at all can't share anything."""
    for name in DIMENSIONS:
        if getattr(parallel, name) == 0:
            yield Fault(
                key=f"parallel.{name}",
                value="0",
                problem="a degree is the number of ranks that share, at least 1",
                allowed="-1 (whatever the others leave), or at least 1",
                fix=f"parallel.{name}=1",
            )


def degrees_make_the_world(parallel: ParallelSpec, cluster: ClusterSpec) -> Iterator[Fault]:
    """The product of the degrees is the number of processes; one degree may be -1 and takes what is left."""
    degrees = {name: getattr(parallel, name) for name in DIMENSIONS}
    free = [name for name, degree in degrees.items() if degree == -1]
    if len(free) > 1:
        yield Fault(
            key=f"parallel.{free[1]}",
            value="-1",
            problem=f"only one degree may be -1, and parallel.{free[0]} is too",
            allowed="one -1 at most",
            fix=f"parallel.{free[1]}=1",
        )
    elif 0 not in degrees.values():
        yield from _product(degrees, free, cluster)


def _product(degrees: dict[str, int], free: list[str], cluster: ClusterSpec) -> Iterator[Fault]:
    world, product = cluster.world_size, math.prod(d for d in degrees.values() if d != -1)
    processes = (
        f"{world} process{'es' * (world != 1)} "
        f"(cluster.nodes {cluster.nodes} × processes_per_node {cluster.processes_per_node})"
    )
    shown = " × ".join(f"{name} {degree}" for name, degree in degrees.items() if degree not in (1, -1)) or "1"
    if free and world % product:
        near = -(-world // product) * product
        yield Fault(
            key="cluster.processes_per_node",
            value=str(cluster.processes_per_node),
            problem=f"{processes} can't be shared out over parallel's {shown} = {product}",
            allowed=f"a multiple of {product} processes: {product}, {2 * product}, {3 * product}, …",
            nearest=str(near),
            fix=f"cluster.nodes=1 cluster.processes_per_node={near}",
        )
    if not free and product != world:
        yield Fault(
            key="parallel.dp_replicate",
            value=str(degrees["dp_replicate"]),
            problem=f"the degrees' product is {product} ({shown}), and there are {processes}",
            allowed=f"degrees with the product {world}, or one of them -1",
            nearest="-1",
            fix="parallel.dp_replicate=-1",
        )


def batch_divides(trainer: TrainerSpec, parallel: ParallelSpec, cluster: ClusterSpec) -> Iterator[Fault]:
    """Each data-parallel rank takes the same number of micro-batches."""
    dims = ParallelDims.possible(parallel, cluster.world_size)
    if dims is None:
        return
    ranks = dims.data_ranks
    unit = trainer.micro_batch_size * ranks
    if trainer.global_batch_size % unit:
        near = max(1, round(trainer.global_batch_size / unit)) * unit
        yield Fault(
            key="trainer.global_batch_size",
            value=str(trainer.global_batch_size),
            problem=(
                f"is not a multiple of {unit} = micro_batch_size {trainer.micro_batch_size} × "
                f"{ranks} data-parallel ranks"
            ),
            allowed=f"{unit}, {2 * unit}, {3 * unit}, …",
            nearest=str(near),
            fix=f"trainer.global_batch_size={near}",
        )
