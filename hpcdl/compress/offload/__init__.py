"""Where weights lie while nobody computes with them: one file a way, found by name.

A way's file holds `Config` (a frozen dataclass below `OffloadSpec`), `check(config, spec)`,
`memory(config, spec)` and `STREAMS`: whether weights pass through layer by layer (hpcdl.distributed.stream),
or stay where the strategy puts them. These files are read on the login node: torch is never imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from hpcdl.byname import Folder
from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, OffloadSpec


class Way(Protocol):
    """What a way's module offers."""

    Config: type[OffloadSpec]
    STREAMS: bool
    """Whether the model is made of working files, a layer in memory at a time."""

    def check(self, config: Any, spec: ExperimentSpec) -> Iterator[Fault]:
        """Faults of this way with this experiment."""
        ...

    def memory(self, config: Any, spec: ExperimentSpec) -> dict[str, int] | None:
        """Bytes that a process holds at its peak, by what they are for; None: as without this way."""
        ...


_folder: Folder[Way] = Folder(__name__, __path__)
names, get = _folder.names, _folder.get


def streams(spec: ExperimentSpec) -> bool:
    """Whether this experiment's weights pass through layer by layer."""
    return get(spec.offload.name).STREAMS
