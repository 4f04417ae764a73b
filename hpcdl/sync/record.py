"""What a run directory remembers of what was sent where (`sync.json`), and that only one sends it at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hpcdl import secrets
from hpcdl.runs.files import locked, write_json
from hpcdl.runs.private import open_to_write
from hpcdl.runs.store import RunDir

FILE = "sync.json"
LOCK = ".sync-{kind}.lock"
POLL_S = 0.2
SOURCES = ("spec.yaml", "sweep.json", "state.json", "metrics.jsonl", "result.json")
"""What a story is made of, besides system-*.jsonl."""

Stamp = dict[str, list[int]]
"""Size and time of change (ns) by file: tells without reading whether there is anything new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What a place has got of a run, all of it as the server has confirmed."""

    digest: str
    """Of all that was sent."""
    stamp: Stamp
    """The files that it was made of, as they were."""
    rows: int
    time: str
    """UTC, ISO 8601."""
    url: str = ""
    id: str = ""
    """The run's id on the server."""
    last_step: int = -1
    """Of the rows that are there."""
    prefix: str = ""
    """Digest of their metrics: while it is that of the same steps here, what is there can be added to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """All that is remembered of one place."""

    sent: Sent | None = None
    """None: nothing, or what is there is not known."""
    spoiled: tuple[str, ...] = ()
    """Ids on the server whose sending never ended, or that hold steps of a lost try: to be deleted there."""
    used: int = 0
    """How many ids the run has had there: a deleted one can't be used again."""
    live: bool = False
    """A try of the run sends by itself."""


def name_of(server: str, entity: str | None, project: str) -> str:
    """The name of a project on a server, without what may be secret in its address."""
    return secrets.mask("/".join(part for part in (server, entity, project) if part))


def stamp(run: RunDir) -> Stamp:
    """The run's files as they are."""
    found: Stamp = {}
    for path in (*(run.path / name for name in SOURCES), *sorted(run.path.glob("system-*.jsonl"))):
        with contextlib.suppress(OSError):
            status = path.stat()
            found[path.name] = [status.st_size, status.st_mtime_ns]
    return found


def read(run: RunDir, name: str) -> Place:
    """What is remembered of the place of that name."""
    return _place(_read_all(run).get(name))


def has_all(run: RunDir, server: str) -> bool:
    """Whether any project of a server has all that is in the run's files now."""
    known = _read_all(run)
    if not known:
        return False
    now = stamp(run)
    begin = name_of(server, None, "") + "/"
    places = [_place(known[name]) for name in known if name.startswith(begin)]
    return any(place.sent is not None and place.sent.stamp == now for place in places)


def _place(known: Any) -> Place:
    try:
        sent = known["sent"]
        return Place(
            sent=Sent(**sent) if sent else None,
            spoiled=tuple(map(str, known["spoiled"])),
            used=int(known["used"]),
            live=bool(known["live"]),
        )
    except (TypeError, KeyError, ValueError):
        return Place()


def write(run: RunDir, name: str, place: Place) -> None:
    """Remembers it."""
    with locked(run.path / ".sync.lock"):
        write_json(run.path / FILE, {**_read_all(run), name: asdict(place)})


@contextlib.contextmanager
def held(run: RunDir, kind: str, wait: Callable[[], bool] = lambda: True) -> Iterator[bool]:
    """Only one sends a run to places of a kind. The kernel frees the lock of one that was killed.

    Args:
        run: which.
        kind: `wandb` or `tensorboard`.
        wait: asked all the while that another one has the lock: whether to go on waiting.

    Yields:
        Whether this process has it.
    """
    descriptor = open_to_write(run.path / LOCK.format(kind=kind), os.O_RDWR)
    try:
        while not (mine := _lock(descriptor)) and wait():
            time.sleep(POLL_S)
        yield mine
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_all(run: RunDir) -> dict[str, Any]:
    try:
        known = json.loads((run.path / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
