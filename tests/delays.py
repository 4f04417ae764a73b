"""How long runs were without training after each disturbance, by their own events.

    python -m tests.delays runs/*/*

    kind       way        agents  trains  step  run
    node       successor     1.9    34.6   180  pretrain_tiny/22f67ae8f2f3

`agents`: seconds from the event that the run goes on (`requeued`, `restarting`) to the agents of the next try (of a
restart in torchrun's hands there are none: `-`), `trains`: to the checkpoint's being loaded, after which the first step
begins. Times of importing torch are in it; Slurm's own delays are, too: `way` says which there may be.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

TOLD = ("requeued", "restarting", "lost")
"""Events that tell of a disturbance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delay:
    """One disturbance. Times in seconds, None: it never came."""

    kind: str
    way: str
    step: int
    agents_s: float | None
    trains_s: float | None


def delays(events: Iterable[Mapping[str, Any]]) -> Iterator[Delay]:
    """Each disturbance of a run, in the order of its events."""
    told: Mapping[str, Any] | None = None
    agents: float | None = None
    for event in events:
        name = event["event"]
        if name in TOLD:
            if told is not None:
                yield _delay(told, agents, None)
            told, agents = event, None
        elif told is not None and name == "started":
            agents = _seconds(told, event)
        elif told is not None and name == "resumed":
            yield _delay(told, agents, _seconds(told, event))
            told = None
    if told is not None:
        yield _delay(told, agents, None)


def _delay(told: Mapping[str, Any], agents_s: float | None, trains_s: float | None) -> Delay:
    return Delay(
        kind=str(told.get("kind", told["event"])),
        way=str(told.get("way") or told.get("in_place") or "-"),
        step=int(told.get("step", 0)),
        agents_s=agents_s,
        trains_s=trains_s,
    )


def _seconds(first: Mapping[str, Any], then: Mapping[str, Any]) -> float:
    return (datetime.fromisoformat(then["time"]) - datetime.fromisoformat(first["time"])).total_seconds()


def main(folders: list[str]) -> None:
    """Prints the table of these run directories."""
    print(f"{'kind':<10} {'way':<10} {'agents':>6} {'trains':>6} {'step':>5}  run")
    for folder in map(Path, folders):
        lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        for each in delays(json.loads(line) for line in lines):
            times = ("-" if s is None else f"{s:.1f}" for s in (each.agents_s, each.trains_s))
            row = f"{each.kind:<10} {each.way:<10} {' '.join(f'{s:>6}' for s in times)} {each.step:>5}"
            print(f"{row}  {folder.parent.name}/{folder.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
