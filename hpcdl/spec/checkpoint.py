"""What a checkpoint says of itself: `trainer.json`, written last, read by workers and by the launcher."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

TRAINER = "trainer.json"
FOLDER = "checkpoints"
"""The folder of a run that holds its checkpoints."""


@dataclass(slots=True, kw_only=True)
class Totals:
    """What the loop counts over the whole run, all tries together."""

    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Input tokens trained on, padding left out."""
    tokens_before: int = 0
    """Of these, the ones of the run that this one continues (`trainer.resume_from`)."""
    train_s: float = 0.0
    """Seconds spent in this run's steps, without evaluation, checkpoints and start-up."""
    profiled_s: float = 0.0
    """Of these, the ones in steps that were profiled (`monitor.communication_steps`)."""
    profiled_tokens: int = 0
    """Tokens of those steps."""
    peak_memory_bytes: int = 0
    """Highest of any rank."""

    def add_time(self, seconds: float, tokens: int, *, profiled: bool) -> None:
        """A step's time."""
        self.train_s += seconds
        if profiled:
            self.profiled_s += seconds
            self.profiled_tokens += tokens

    @property
    def tokens_per_s(self) -> float:
        """This run's mean speed; profiled steps count only where there are no others."""
        tokens, seconds = self.tokens - self.tokens_before, self.train_s
        if tokens > self.profiled_tokens and seconds > self.profiled_s:
            tokens, seconds = tokens - self.profiled_tokens, seconds - self.profiled_s
        return tokens / seconds if seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A whole checkpoint on disk."""

    path: Path
    totals: Totals
    world_size: int
    """Ranks that have written it."""
    data_digest: str
    seed: int
    global_batch_size: int | None
    """None: written before this was noted."""
    first_step: int
    """The step that its run began from: above 0 where that one continues another run."""

    @property
    def step(self) -> int:
        """Steps done."""
        return self.totals.step

    def other_batches(self, seed: int, global_batch_size: int) -> Iterator[tuple[str, int, int]]:
        """Why a run would not get the batches that come next: keys, the checkpoint's value, the run's."""
        if self.seed != seed:
            yield "seed", self.seed, seed
        known = self.global_batch_size
        if known is not None and known != global_batch_size:
            yield "trainer.global_batch_size", known, global_batch_size


def name_of(step: int) -> str:
    """The folder's name: `step-00000100`."""
    return f"step-{step:08d}"


def read(path: Path) -> Found | None:
    """The checkpoint in `path` if it is whole: every file there, as long as when it was written."""
    try:
        record = json.loads((path / TRAINER).read_text(encoding="utf-8"))
        whole = all((path / name).stat().st_size == size for name, size in record["files"].items())
        return _parse(path, record) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _parse(path: Path, record: Mapping[str, Any]) -> Found:
    known = {field.name for field in fields(Totals)}
    return Found(
        path=path,
        totals=Totals(**{key: value for key, value in record["totals"].items() if key in known}),
        world_size=record["world_size"],
        data_digest=record["data_digest"],
        seed=record["seed"],
        global_batch_size=record.get("global_batch_size"),
        first_step=record.get("first_step", 0),
    )


def newest(folder: Path) -> tuple[Found | None, list[Path]]:
    """The newest whole checkpoint in a run's folder of checkpoints, and the torn ones that are newer."""
    torn: list[Path] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        found = read(path)
        if found is not None:
            return found, torn
        torn.append(path)
    return None, torn
