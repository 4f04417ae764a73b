"""The wish that a run should end, kept in its directory: workers see it wherever they are, and Slurm may be away.

The STOP file's first word says why; its second line, `now`, that no checkpoint is waited for.
"""

from __future__ import annotations

import os
from typing import Literal

from hpcdl.runs.files import write_atomic
from hpcdl.runs.store import RunDir

Wish = Literal["", "gentle", "now"]


def make(run: RunDir, *, now: bool) -> None:
    """Writes the wish down."""
    by = f"cancel {os.environ.get('USER', '')}".rstrip()
    write_atomic(run.stop_file, f"{by}\n{'now' if now else ''}".rstrip() + "\n")


def of(run: RunDir) -> Wish:
    """What was wished, if anything. A STOP file that tells of a signal is no wish."""
    try:
        lines = run.stop_file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    if not lines or lines[0].startswith("SIG"):
        return ""
    return "now" if lines[1:2] == ["now"] else "gentle"
