"""What a checkpoint says of itself: `trainer.json`, written last, read by workers and by the launcher.

It has the length and the CRC-32 of every file, and one of its own. Lengths cost a look each, so that whoever wants
the newest whole checkpoint asks for those (`look`); reading every byte (`check`) is for who is about to load it, and
for `hpcdl checkpoints --verify`. CRC-32 because it is in the standard library of login nodes too: 2.2 GB/s on one
core here (xxh3: 12), beside disks that write 1.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

TRAINER = "trainer.json"
FOLDER = "checkpoints"
"""The folder of a run that holds its checkpoints."""
SEAL = "seal"
"""The key in trainer.json that has the checksum of all others."""
BLOCK = 2**22
"""Bytes that are read at a time."""
_NAME = re.compile(r"step-(\d{8,})")


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
class Written:
    """A file of a checkpoint, as it was when it was written."""

    size: int
    """Bytes."""
    crc32: int | None
    """None: written before checksums were noted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A checkpoint on disk, every file there and as long as when it was written."""

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
    heldout_loss: float | None = None
    """Of the same step; None: not evaluated there, or not yet."""
    saved: str = ""
    """When, UTC, ISO 8601; empty: written before this was noted."""
    files: Mapping[str, Written] = field(default_factory=dict)
    """By name, all but trainer.json."""

    @property
    def step(self) -> int:
        """Steps done."""
        return self.totals.step

    @property
    def size(self) -> int:
        """Bytes of all files but trainer.json."""
        return sum(file.size for file in self.files.values())

    @property
    def has_checksums(self) -> bool:
        """Whether changed bytes can be told from right ones."""
        return all(file.crc32 is not None for file in self.files.values())

    def other_batches(self, seed: int, global_batch_size: int) -> Iterator[tuple[str, int, int]]:
        """Why a run would not get the batches that come next: keys, the checkpoint's value, the run's."""
        if self.seed != seed:
            yield "seed", self.seed, seed
        known = self.global_batch_size
        if known is not None and known != global_batch_size:
            yield "trainer.global_batch_size", known, global_batch_size


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong with a checkpoint."""

    file: str
    """Its name in the checkpoint's folder."""
    problem: str
    """In words: `missing`."""
    torn: bool
    """Whether it is missing or of another length; else its bytes are others."""

    def __str__(self) -> str:
        """`torn: __0_0.distcp is missing`."""
        return f"{self.word}: {self.file} {self.problem}"

    @property
    def word(self) -> str:
        """`torn` or `corrupt`."""
        return "torn" if self.torn else "corrupt"


def name_of(step: int) -> str:
    """The folder's name: `step-00000100`."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in a folder's name; -1 where it is no checkpoint's."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def folders(folder: Path) -> list[Path]:
    """A run's checkpoints, whole or not, the newest first."""
    return sorted((path for path in folder.glob("step-*") if step_of(path) >= 0), key=step_of, reverse=True)


def kept(whole: Sequence[Found], last: int, best: int) -> dict[str, list[str]]:
    """Which checkpoints stay, by their folders' names, and as what (`last`, `best`).

    Args:
        whole: those that are whole, the newest first.
        last: how many of the newest stay (`trainer.keep_last`).
        best: how many of those with the lowest held-out loss do (`trainer.keep_best`).
    """
    evaluated = [
        (found.heldout_loss, -found.step, found) for found in whole if found.heldout_loss is not None
    ]
    ranked = [found for loss, _, found in sorted(evaluated, key=lambda each: each[:2]) if math.isfinite(loss)]
    stay: dict[str, list[str]] = {}
    for word, chosen in (("last", whole[:last]), ("best", ranked[:best])):
        for found in chosen:
            stay.setdefault(found.path.name, []).append(word)
    return stay


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its own checksum, as it is to be written."""
    plain = {key: value for key, value in record.items() if key != SEAL}
    return {**plain, SEAL: _seal_of(plain)}


def read(path: Path) -> Found | None:
    """The checkpoint in `path` if it is whole: every file there, as long as when it was written."""
    found = look(path)
    return found if isinstance(found, Found) else None


def look(path: Path) -> Found | Damage:
    """The checkpoint in `path`, or what is wrong with it, as far as names and lengths tell."""
    try:
        record = json.loads((path / TRAINER).read_bytes())
    except FileNotFoundError:
        return Damage(TRAINER, "is missing", torn=True)
    except OSError as error:
        return Damage(TRAINER, f"can't be read ({error.strerror})", torn=True)
    except ValueError:
        return Damage(TRAINER, "is no JSON", torn=False)
    try:
        if SEAL in record and record[SEAL] != _seal_of({k: v for k, v in record.items() if k != SEAL}):
            return Damage(TRAINER, "has another checksum than when it was written", torn=False)
        found = _parse(path, record)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Damage(TRAINER, "is no checkpoint's record", torn=False)
    for name, file in found.files.items():
        problem = _length(path / name, file)
        if problem:
            return Damage(name, problem, torn=True)
    return found


def check(path: Path, name: str, file: Written) -> Damage | None:
    """What is wrong with one file of a checkpoint: reads all of it, where its checksum is known."""
    problem = _length(path / name, file)
    if problem:
        return Damage(name, problem, torn=True)
    if file.crc32 is None:
        return None
    try:
        read_back = crc32_of(path / name)
    except OSError as error:
        return Damage(name, f"can't be read ({error.strerror})", torn=True)
    if read_back != file.crc32:
        return Damage(
            name, f"has CRC-32 {read_back:08x}, and {file.crc32:08x} when it was written", torn=False
        )
    return None


def crc32_of(path: Path) -> int:
    """The CRC-32 of a file's content (RFC 1952), read a block at a time."""
    value = 0
    block = bytearray(BLOCK)
    view = memoryview(block)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            value = zlib.crc32(view[:count], value)
    return value


def newest(folder: Path) -> tuple[Found | None, list[tuple[Path, Damage]]]:
    """The newest checkpoint in a run's folder that looks whole, and what is wrong with those that are newer."""
    broken: list[tuple[Path, Damage]] = []
    for path in folders(folder):
        found = look(path)
        if isinstance(found, Found):
            return found, broken
        broken.append((path, found))
    return None, broken


def _length(path: Path, file: Written) -> str:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"can't be read ({error.strerror})"
    return "" if size == file.size else f"has {size:,} bytes, and {file.size:,} when it was written"


def _seal_of(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"{zlib.crc32(text.encode()):08x}"


def _parse(path: Path, record: Mapping[str, Any]) -> Found:
    known = {field.name for field in fields(Totals)}
    sums = record.get("crc32", {})
    files = {
        _plain(name): Written(size=int(size), crc32=int(sums[name], 16) if name in sums else None)
        for name, size in record["files"].items()
    }
    loss = record.get("heldout_loss")
    return Found(
        path=path,
        totals=Totals(**{key: value for key, value in record["totals"].items() if key in known}),
        world_size=record["world_size"],
        data_digest=record["data_digest"],
        seed=record["seed"],
        global_batch_size=record.get("global_batch_size"),
        first_step=record.get("first_step", 0),
        heldout_loss=float(loss) if loss is not None and math.isfinite(loss) else None,
        saved=str(record.get("saved", "")),
        files=files,
    )


def _plain(name: str) -> str:
    """A name without a way out of the folder: the record may be somebody else's."""
    if "/" in name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is no file's name")
    return name
