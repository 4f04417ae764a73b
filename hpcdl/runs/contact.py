"""When a scheduler answered last, beside the runs: so that a look can say since when a state is unknown.

Best effort: whoever may not write here still sees the states; times are then those of the runs' own files.
"""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hpcdl.runs.files import write_json
from hpcdl.runs.store import now

FILES = {"slurm": ".slurm-answered.json", "kubernetes": ".kubernetes-answered.json"}
"""By the cluster's kind."""
EVERY_S = 10.0
"""Not written more often: a thousand agents and lookers share the folder."""


def answered(runs_dir: Path, kind: str = "slurm") -> None:
    """The scheduler of a cluster's kind has just answered."""
    last = last_answer(runs_dir, kind)
    if last is not None and datetime.now(UTC) - datetime.fromisoformat(last) < timedelta(seconds=EVERY_S):
        return
    with contextlib.suppress(OSError):
        write_json(runs_dir / FILES[kind], {"answered": now()}, durable=False)


def last_answer(runs_dir: Path, kind: str = "slurm") -> str | None:
    """When it last did, as far as anybody who looked has noted (to 10 s); None where nobody has."""
    try:
        time = str(json.loads((runs_dir / FILES[kind]).read_text(encoding="utf-8"))["answered"])
        datetime.fromisoformat(time)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return time
