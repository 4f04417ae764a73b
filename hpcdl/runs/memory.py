"""memory.json of a run: where the bytes of a step went, beside the plan."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "memory.json"
LABELS = {
    "weights": "weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "recomputed": "recomputed block",
    "logits": "logits",
    "buffers": "weights made whole",
    "temporary": "temporary",
    "tensors": "tensors, at most",
    "runtime": "libraries",
    "kept": "freed, not given back",
    "peak": "peak",
}
"""Rows of the table, in order. Each of the upper ones has its highest moment at another time: `tensors`, what is
there at once at the most, is less than their sum. Of the lower ones, `libraries` is what is left of the process's
memory after the step, `freed, not given back` what the allocator keeps then for the next one."""


def file_of(folder: Path, rank: int) -> Path:
    """Where a rank of a run writes its own."""
    return folder / (FILE if rank == 0 else f"memory-rank{rank}.json")


def load(folder: Path) -> dict[str, Any] | None:
    """What the first rank has written; None where there is none, or none that can be read."""
    return read(file_of(folder, 0))


def read(file: Path) -> dict[str, Any] | None:
    """What a rank has written; None where there is none, or none that can be read."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("measured"), dict) else None


def of_ranks(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """What each rank has written, in order; those left out that can't be read."""
    found = (read(file_of(folder, rank)) for rank in range(ranks))
    return [record for record in found if record is not None]


def in_result(folder: Path, ranks: int) -> dict[str, Any] | None:
    """Planned and measured bytes for result.json, of the rank that had the most tensors; None: not measured."""
    records = [
        record for record in of_ranks(folder, ranks) if isinstance(record["measured"].get("tensors"), int)
    ]
    if not records:
        return None
    fullest = max(records, key=lambda record: record["measured"]["tensors"])
    planned, measured = fullest.get("planned") or {}, fullest["measured"]
    return {
        "ranks": len(records),
        "fullest_rank": fullest.get("rank", 0),
        "planned_tensors_bytes": planned.get("tensors"),
        "tensors_bytes": measured["tensors"],
        "planned_peak_bytes": planned.get("peak"),
        "peak_bytes": measured.get("peak"),
    }


def rows(record: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Category, planned, measured, and how far the plan is off; those left out that are nothing in both."""
    planned, measured = record.get("planned") or {}, record["measured"]
    for name, label in LABELS.items():
        plan, found = planned.get(name), measured.get(name)
        if (plan or 0) < 1024 and (found or 0) < 1024:
            continue
        off = f"{100 * (plan / found - 1):+.1f} %" if plan is not None and found else ""
        yield label, _amount(plan), _amount(found), off


def notes(record: dict[str, Any]) -> Iterator[str]:
    """What the table's figures are of, a line each."""
    rank, ranks = record.get("rank", 0), record.get("world_size", 1)
    whose = "" if ranks == 1 else f", rank {rank} of {ranks}: this rank's own"
    yield f"where the bytes go: step {record.get('step')}{whose}"


def remarks(record: dict[str, Any]) -> Iterator[str]:
    """What else is known of them, a line each, to stand below the table."""
    measured = record["measured"]
    if record.get("mapped_bytes"):
        yield (
            f"of the weights {_amount(record['mapped_bytes'])} lie in mapped files, of which"
            f" {_amount(record.get('mapped_resident_bytes', 0))} are in memory"
        )
    resident = record.get("resident") or {}
    if resident:
        yield (
            f"resident after the step {_amount(resident['now'])}: {_amount(resident['anonymous'])} of its own,"
            f" {_amount(resident['file'])} mapped from files; at most so far {_amount(resident['peak'])}"
        )
    if record.get("device") == "cuda":
        yield f"peak: torch.cuda.max_memory_allocated; reserved {_amount(measured.get('reserved', 0))}"
    if record.get("planned") is None:
        yield "planned: no closed form for this strategy, optimizer or model"


def as_text(record: dict[str, Any]) -> str:
    """The table as the log has it."""
    table = [("", "planned", "measured", "plan is off by"), *rows(record)]
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    lines = [
        f"  {name:<{widths[0]}}  {plan:>{widths[1]}}  {found:>{widths[2]}}  {off:>{widths[3]}}".rstrip()
        for name, plan, found, off in table
    ]
    return "\n".join([*notes(record), *lines, *(f"  {line}" for line in remarks(record))])


def in_short(record: dict[str, Any]) -> str:
    """One line for the card: the largest parts of what was measured, and the plan's peak."""
    measured, planned = record["measured"], record.get("planned") or {}
    parts = sorted(
        (
            (measured.get(name) or 0, label)
            for name, label in LABELS.items()
            if name not in ("tensors", "kept", "peak")
        ),
        reverse=True,
    )
    named = ", ".join(f"{label} {_amount(size)}" for size, label in parts[:4] if size)
    plan = f"; planned {_amount(planned['tensors'])} of tensors" if "tensors" in planned else ""
    return f"{_amount(measured['tensors'])} of tensors at most{plan}: {named}"


def _amount(count: float | None) -> str:
    if count is None:
        return "-"
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.1f} MiB" if count >= 2**17 else f"{count / 2**10:.1f} KiB"
