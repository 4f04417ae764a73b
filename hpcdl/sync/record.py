"""What a run directory remembers of what was sent where (`sync.json`), and that only one sends it at a time.

The record only saves work: without it everything is sent once more, to where it replaces itself.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hpcdl.runs.files import locked, write_json
from hpcdl.runs.store import RunDir

FILE = "sync.json"
LOCK = ".sync.lock"
SOURCES = ("spec.yaml", "sweep.json", "state.json", "metrics.jsonl", "result.json")
"""What a story is made of, besides system-*.jsonl."""

Stamp = dict[str, list[int]]
"""Size and time of change (ns) by file: tells without reading whether there is anything new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What a place has got of a run."""

    digest: str
    """Of all that was sent."""
    stamp: Stamp
    """The files that it was made of, as they were."""
    rows: int
    time: str
    """UTC, ISO 8601."""
    url: str = ""


def stamp(run: RunDir) -> Stamp:
    """The run's files as they are."""
    found: Stamp = {}
    for path in (*(run.path / name for name in SOURCES), *sorted(run.path.glob("system-*.jsonl"))):
        with contextlib.suppress(OSError):
            status = path.stat()
            found[path.name] = [status.st_size, status.st_mtime_ns]
    return found


def read(run: RunDir, place: str) -> Sent | None:
    """What `place` has got of the run, as far as is remembered."""
    known = _read_all(run).get(place)
    try:
        return Sent(**known) if known else None
    except TypeError:
        return None


def write(run: RunDir, place: str, sent: Sent) -> None:
    """Remembers it; the lock is held."""
    write_json(run.path / FILE, {**_read_all(run), place: asdict(sent)})


@contextlib.contextmanager
def held(run: RunDir) -> Iterator[None]:
    """Only one sends a run; the next one waits. The kernel frees the lock of one that was killed."""
    with locked(run.path / LOCK):
        yield


def _read_all(run: RunDir) -> dict[str, Any]:
    try:
        known = json.loads((run.path / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
