"""A benchmark's table in a page of the docs, between two comments that say who writes it."""

from __future__ import annotations

import sys
from pathlib import Path


def put(file: Path, text: str, begin: str, end: str) -> None:
    """Replaces what is between the markers."""
    before, _, rest = file.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"{file} has no markers {begin} … {end}")
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
