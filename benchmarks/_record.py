"""The record of one benchmark's run: what docs/benchmarks.md is made of."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from _peers import CHECKOUT

from hpcdl.runs.files import write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run of one benchmark."""

    name: str
    command: str
    quick: bool
    """Fewer rounds than by default."""
    date: str
    """When it began, UTC."""
    seconds: float
    load: tuple[float, float]
    """Of one minute, before and after: what else the machine did."""
    revision: str
    machine: dict[str, Any]
    text: str
    """What it printed, in Markdown."""
    goals: tuple[tuple[str, bool | None], ...] = ()
    figures: Any = None
    fault: str | None = None
    """Why there is no result; None: there is one."""
    ran: bool = True
    """False: it lacked something, and was not started."""
    before: Record | None = None
    """Where this one failed, the last that did not."""

    @classmethod
    def of(cls, *, left: Path, **known: Any) -> Record:
        """With what the benchmark has left in a file, where it has.

        Args:
            left: the file.
            known: the other fields.
        """
        found: dict[str, Any] = json.loads(left.read_text()) if left.exists() else {}
        goals = tuple((words, met) for words, met in found.get("goals", ()))
        return cls(goals=goals, figures=found.get("figures"), **known)

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.fault is not None:
            return "FAILED" if self.ran else "not run"
        missed = sum(met is False for _, met in self.goals)
        unknown = sum(met is None for _, met in self.goals)
        parts = [f"{missed} of {len(self.goals)} goals MISSED"] if missed else []
        parts += [f"{unknown} not measured"] if unknown else []
        return ", ".join(parts) or ("met" if self.goals else "no goal")


def write(folder: Path, record: Record) -> None:
    """Keeps it; where it failed, with the last that did not."""
    if record.fault is not None and (last := read(folder, record.name)) is not None:
        good = last if last.fault is None else last.before
        record = Record(**{**_fields(record), "before": good})
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{record.name}.json", _without_places(asdict(record)))


def read(folder: Path, name: str) -> Record | None:
    """The last record of a benchmark."""
    file = folder / f"{name}.json"
    return _from(json.loads(file.read_text())) if file.exists() else None


def read_all(folder: Path) -> dict[str, Record]:
    """The last records, by name."""
    found = (read(folder, file.stem) for file in sorted(folder.glob("*.json")))
    return {record.name: record for record in found if record is not None}


def _without_places(plain: Any) -> Any:
    """The same without the folders of this machine: a traceback names them, and the page is read elsewhere."""
    if isinstance(plain, dict):
        return {key: _without_places(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [_without_places(value) for value in plain]
    if isinstance(plain, str):
        for place, name in ((sys.prefix, "VENV"), (str(CHECKOUT), "."), (str(Path.home()), "~")):
            plain = plain.replace(f"{place}/", f"{name}/")
    return plain


def _from(plain: dict[str, Any]) -> Record:
    before = plain["before"]
    return Record(
        **{
            **plain,
            "load": tuple(plain["load"]),
            "goals": tuple((words, met) for words, met in plain["goals"]),
            "before": _from(before) if before else None,
        }
    )


def _fields(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in Record.__slots__}


def revision(checkout: Path) -> str:
    """The commit; with `+` where files differ from it. Results and the page of benchmarks don't count."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ("git", "-C", str(checkout), *words), capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    if not (commit := git("rev-parse", "--short", "HEAD")):
        return "no git"
    others = (":!benchmarks/results", ":!docs/benchmarks.md")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    return f"{commit}+" if changed else commit


def machine_of() -> dict[str, Any]:
    """What a figure depends on: processor, cores, memory, kernel, Python, torch."""
    cpu = next(
        (line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.machine()
    )
    total = next((line for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "")
    return {
        "cpu": cpu.partition(":")[2].strip() or cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(total.split()[1]) / 2**20, 1) if total else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
    }


def _lines(file: str) -> list[str]:
    path = Path(file)
    return path.read_text().splitlines() if path.exists() else []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
