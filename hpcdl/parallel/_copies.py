"""What the strategies share in which every process trains a copy of the whole model of its own."""

from __future__ import annotations

from collections.abc import Iterator

from hpcdl.errors import Fault
from hpcdl.spec import ParallelSpec
from hpcdl.spec.traffic import Sent, Sizes

OTHERS = {"dp_shard": "fsdp", "cp": "cp", "tp": "tp", "pp": "pp"}
"""The degrees that take a model or a sequence apart, and the strategy that each belongs to."""


BUCKET_BYTES = 64 * 2**20
"""As hpcdl.distributed.collectives has it (which imports torch); a test compares them."""


def average(what: str, numbers: float, every: int, sizes: Sizes) -> Iterator[Sent]:
    """An all-reduce of fp32 numbers over all copies, once in `every` steps."""
    if sizes.dims.dp_replicate == 1:
        return
    buckets = max(1.0, 4 * numbers / BUCKET_BYTES)
    yield Sent(
        what=f"all-reduce of {what}",
        dimension="dp_replicate",
        kind="all_reduce",
        ranks=sizes.dims.dp_replicate,
        calls=buckets / every,
        size=4 * numbers / buckets,
    )


def whole_models_only(config: ParallelSpec) -> Iterator[Fault]:
    """Copies are all that these strategies make: no degree may take a model apart."""
    for name, strategy in OTHERS.items():
        degree = getattr(config, name)
        if degree != 1:
            yield Fault(
                key=f"parallel.{name}",
                value=str(degree),
                problem=f"{config.name} trains a whole model on every process and can't take it apart",
                allowed=f"1; parallel={strategy} does that, without {config.name}",
                nearest="1",
                fix=f"parallel.{name}=1",
            )
