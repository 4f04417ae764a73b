"""The commands of `hpcdl`, one file each: `HELP`, a line; `add(parser)`, its words and options; `run(options)`, which
does it and returns the exit code.

Every call of `hpcdl` imports all these files, for its own help: they import what they need inside `run`.
"""

from __future__ import annotations

import argparse
from typing import Protocol

from hpcdl.byname import Folder

ORDER = (
    "plan",
    "config",
    "status",
    "top",
    "logs",
    "follow",
    "cancel",
    "resubmit",
    "result",
    "checkpoints",
    "compare",
    "report",
    "sync",
)
"""As the help shows them; others after them."""


class Verb(Protocol):
    """What a file of this folder offers."""

    HELP: str
    """And, where its words name runs, `RUNS`: the option that they lie in."""

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Its words and options."""

    def run(self, options: argparse.Namespace) -> int:
        """Does it."""


FOLDER: Folder[Verb] = Folder(__name__, __path__)


def names() -> list[str]:
    """All of them, as the help shows them."""
    rank = {name: place for place, name in enumerate(ORDER)}
    return sorted(FOLDER.names(), key=lambda name: (rank.get(name, len(ORDER)), name))


def get(name: str) -> Verb:
    """The command of that name."""
    return FOLDER.get(name)
