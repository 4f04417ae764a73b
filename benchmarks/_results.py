"""What a benchmark leaves for run.py besides what it prints: its figures, and which of its goals were met."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PLACE = "HPCDL_BENCH_RESULT"
"""Environment variable: the file that run.py asks for. One that left none has failed, whatever its exit code."""

Goal = tuple[str, bool | None]
"""In words, with the figure that came out; met, missed, or None: it could not be measured."""


def leave(figures: Any, goals: Sequence[Goal]) -> None:
    """To be called once all is measured; does nothing where nobody asked."""
    place = os.environ.get(PLACE)
    if place:
        Path(place).write_text(
            json.dumps({"figures": figures, "goals": [list(goal) for goal in goals]}, default=str)
        )


def tell(report: Any, text: str, goals: Sequence[Goal], *, as_json: bool) -> int:
    """Prints a report, for people or as JSON, and leaves it.

    Returns:
        The exit code: 0 where every goal was met.
    """
    print(json.dumps(report, indent=2) if as_json else text)
    leave(report, goals)
    return 0 if all(met is True for _, met in goals) else 1
