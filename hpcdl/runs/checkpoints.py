"""`hpcdl checkpoints`: what a run could go on from, what is kept as what, and whether it is whole. No torch needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdl.runs import words
from hpcdl.runs.store import RunDir
from hpcdl.spec.checkpoint import Damage, Found, check, folders, kept, look, step_of
from hpcdl.spec.plain import load_yaml

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One folder of a run's checkpoints."""

    path: Path
    found: Found | None
    """None: it is torn, or its record is no record."""
    damage: tuple[Damage, ...]
    kept_as: tuple[str, ...] = ()
    """`last`, `best`."""
    verified: bool
    """Whether all its bytes were read, and have the checksums that they were written with."""
    saved: str
    """When, UTC, ISO 8601: as it says itself, else as its files do."""
    size: int
    """Bytes on the disk."""

    @property
    def state(self) -> str:
        """`whole`, `torn` (a file is missing or of another length) or `corrupt` (other bytes)."""
        return self.damage[0].word if self.damage else "whole"


def collect(run: RunDir, *, verify: bool = False) -> list[Checkpoint]:
    """A run's checkpoints, the oldest first.

    Args:
        run: the run, which may be training meanwhile: one that is taken away while it is looked at is left out.
        verify: read every byte.
    """
    trainer = load_yaml(run.spec_file).get("trainer", {})
    seen = []
    for path in folders(run.checkpoints):
        with contextlib.suppress(FileNotFoundError):
            seen.append(_look_at(path, verify=verify))
    whole = [each.found for each in seen if each.found is not None and not each.damage]
    stay = kept(whole, int(trainer.get("keep_last", 1)), int(trainer.get("keep_best", 0)))
    return [replace(each, kept_as=tuple(stay.get(each.path.name, ()))) for each in reversed(seen)]


def _look_at(path: Path, *, verify: bool) -> Checkpoint:
    found = look(path)
    damage: tuple[Damage, ...] = (found,) if isinstance(found, Damage) else ()
    if verify and isinstance(found, Found):
        checked = (check(path, name, file) for name, file in found.files.items())
        damage = tuple(problem for problem in checked if problem is not None)
    whole = found if isinstance(found, Found) else None
    moment = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="milliseconds")
    return Checkpoint(
        path=path,
        found=whole,
        damage=damage,
        verified=verify and not damage and whole is not None and whole.has_checksums,
        saved=(whole.saved if whole else "") or moment,
        size=sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
    )


def next_start(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """The one that the run would go on from, as far as was looked: the newest whole one."""
    return max(
        (each for each in checkpoints if not each.damage), key=lambda each: step_of(each.path), default=None
    )


def as_json(checkpoints: Iterable[Checkpoint]) -> list[dict[str, Any]]:
    """For scripts: an object a checkpoint, the oldest first."""
    return [
        {
            "step": step_of(each.path),
            "path": str(each.path),
            "state": each.state,
            "verified": each.verified,
            "has_checksums": each.found is not None and each.found.has_checksums,
            "damage": [{"file": d.file, "problem": d.problem} for d in each.damage],
            "saved": each.saved,
            "age_s": round(words.since(each.saved), 1),
            "bytes": each.size,
            "ranks": each.found.world_size if each.found else None,
            "heldout_loss": each.found.heldout_loss if each.found else None,
            "kept": list(each.kept_as),
        }
        for each in checkpoints
    ]


def print_list(console: Console, run: RunDir, checkpoints: list[Checkpoint]) -> None:
    """A line a checkpoint, and where the run would go on."""
    from rich.table import Table
    from rich.text import Text

    if not checkpoints:
        console.print(Text(f"{run.path.name} has no checkpoint"), soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("step", "age", "size", "ranks", "held-out loss", "kept as", "state"):
        right = name in ("step", "age", "size", "ranks", "held-out loss")
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "state")
    for each in checkpoints:
        found = each.found
        table.add_row(
            str(step_of(each.path)),
            words.age(words.since(each.saved)),
            words.size(each.size),
            str(found.world_size) if found else "-",
            words.number(found.heldout_loss if found else None),
            ", ".join(each.kept_as) or "-",
            Text(_in_words(each), "red" if each.damage else "green"),
        )
    console.print(table)
    start = next_start(checkpoints)
    goes_on = f"goes on from step {step_of(start.path)}" if start else "would begin anew: none is whole"
    console.print(Text(f"{run.path.name} {goes_on}; {run.checkpoints}", "dim"), soft_wrap=True)


def _in_words(each: Checkpoint) -> str:
    if each.damage:
        return "; ".join(str(damage) for damage in each.damage)
    if each.verified:
        return "whole, verified"
    if each.found is not None and not each.found.has_checksums:
        return "whole by its files' lengths (saved without checksums)"
    return "whole by its files' lengths"
