"""What the strategies share in which every process trains a copy of the whole model of its own."""

from __future__ import annotations

from collections.abc import Iterator

from hpcdl.errors import Fault
from hpcdl.spec import ParallelSpec

OTHERS = {"dp_shard": "fsdp", "cp": "cp", "tp": "tp", "pp": "pp"}
"""The degrees that take a model or a sequence apart, and the strategy that each belongs to."""


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
