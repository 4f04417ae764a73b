"""Commands on a model, done on the compute side: one file each, found by name (hpcdl.launch.tools starts them).

A tool's file holds `run(request) -> dict`: what it says, printed as a table or as JSON; `as_text(found)` where
the table is no good. It shows progress on standard error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcdl.spec import ExperimentSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a tool is asked to do."""

    spec: ExperimentSpec
    """Which model, data, precision, method: validated."""
    adapters: tuple[tuple[Path, float], ...] = ()
    """Folders of adapters that go on the model together, and how much each counts (hpcdl.worker.adapters)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What this tool is asked besides, by name (hpcdl.launch.tools)."""
    out: Path | None = None
    """Folder to write, for tools that write one. It is made whole beside it and renamed (hpcdl.worker.cache)."""
