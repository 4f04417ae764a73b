"""What this machine knows of runs that lie on a cluster and were submitted from here over ssh.

`<runs_dir>/.remote/<place>/` holds, for each login node and folder of runs there:

    place.json      the host, the folder, the Python
    runs.jsonl      a line for each run that was submitted: its ids and where it lies
    seen.json       what the cluster last said of its runs, and when

The truth is on the cluster. Nothing of this is ever shown as a run's state, but with the time that it was said.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcdl.runs.files import append_line, read_lines, write_json
from hpcdl.runs.query import runs_dir
from hpcdl.runs.store import now

FOLDER = ".remote"
"""Of the folder of all runs."""
_LEAST = 4
"""Characters of a run id's beginning that are taken for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A login node and a folder of runs there."""

    host: str
    """As ssh is given it."""
    folder: str
    """Of all runs; absolute as soon as the host was asked, else as it was typed."""
    python: str | None = None
    """That runs hpcdl there; None: python3 of a login shell."""

    @property
    def name(self) -> str:
        """Of its folder here."""
        digest = hashlib.sha256(f"{self.host}\0{self.folder}".encode()).hexdigest()[:8]
        return f"{re.sub(r'[^A-Za-z0-9.-]', '-', self.host)}-{digest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A run that was submitted from here."""

    run_id: str
    name: str
    run_dir: str
    """There."""
    job_id: str | None = None
    sweep: str | None = None
    submitted: str = ""
    """When, in UTC."""


def is_any(option: str | None) -> bool:
    """Whether anything was ever submitted over ssh from this folder of runs."""
    return (runs_dir(option) / FOLDER).is_dir()


def places(folder: Path) -> list[Place]:
    """Every place that was submitted to, the last one first."""
    found: list[tuple[float, Place]] = []
    for file in (folder / FOLDER).glob("*/place.json"):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            place = Place(**{field.name: record[field.name] for field in dataclasses.fields(Place)})
            found.append((file.stat().st_mtime, place))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being made, or no record of ours
    return [place for _, place in sorted(found, key=lambda one: -one[0])]


def keep(folder: Path, place: Place, runs: Iterable[Known]) -> None:
    """Writes down what was submitted."""
    here = _folder(folder, place)
    write_json(here / "place.json", dataclasses.asdict(place), durable=False)
    for run in runs:
        append_line(here / "runs.jsonl", dataclasses.asdict(run))


def _folder(folder: Path, place: Place) -> Path:
    above = folder / FOLDER
    above.mkdir(parents=True, exist_ok=True)
    above.chmod(0o700)
    here = above / place.name
    here.mkdir(mode=0o700, exist_ok=True)
    return here


def known(folder: Path, place: Place) -> list[Known]:
    """The runs that were submitted there, each once, with what was said last; the last one last."""
    names = {field.name for field in dataclasses.fields(Known)}
    runs: dict[str, Known] = {}
    for record in read_lines(folder / FOLDER / place.name / "runs.jsonl"):
        try:
            run = Known(**{key: value for key, value in record.items() if key in names})
        except TypeError:
            continue  # no record of ours
        runs.pop(run.run_id, None)
        runs[run.run_id] = run
    return list(runs.values())


def fits(run: Known, word: str) -> bool:
    """Whether a user may mean this run by a word: its id or the beginning of it, name, sweep, job, directory."""
    job = run.job_id or ""
    return (
        word in (run.run_id, run.name, run.sweep, run.job_id, job.partition("_")[0] or None)
        or (len(word) >= _LEAST and run.run_id.startswith(word))
        or (os.sep in word and word.rstrip(os.sep) == run.run_dir)
    )


def saw(folder: Path, place: Place, rows: Sequence[dict[str, Any]]) -> None:
    """Writes down what the cluster says of its runs; what it said of others before stays."""
    before, _ = last_seen(folder, place)
    merged = {str(row.get("run_id")): row for row in (*before, *rows)}
    write_json(
        _folder(folder, place) / "seen.json", {"at": now(), "runs": list(merged.values())}, durable=False
    )


def last_seen(folder: Path, place: Place) -> tuple[list[dict[str, Any]], str]:
    """What the cluster said of its runs the last time that it was asked, and when that was; empty if never."""
    try:
        record = json.loads((folder / FOLDER / place.name / "seen.json").read_text(encoding="utf-8"))
        return [dict(row) for row in record["runs"]], str(record["at"])
    except (OSError, ValueError, KeyError, TypeError):
        return [], ""
