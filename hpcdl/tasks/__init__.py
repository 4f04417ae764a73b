"""Tasks: what the loss is taken over. One file each, found by name; this is their light side.

A task's file holds `Config` (a frozen dataclass below `TaskSpec`) and `check(config, spec)`; torch never. The
torch side is the file of the same name in hpcdl/worker/tasks/.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from hpcdl.byname import Folder
from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, TaskSpec


class Task(Protocol):
    """What a task's module offers."""

    Config: type[TaskSpec]

    def check(self, config: Any, spec: ExperimentSpec) -> Iterator[Fault]:
        """Faults of this task with this experiment."""
        ...


_folder: Folder[Task] = Folder(__name__, __path__)
names, get = _folder.names, _folder.get
