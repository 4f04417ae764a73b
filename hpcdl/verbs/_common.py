"""What several commands say and ask in the same way."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpcdl.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

CONFIRM_FROM = 10
"""Cancelling or resubmitting so many runs asks first."""


def count(text: str) -> int:
    """Argparse's type of a whole number from 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def console() -> Console:
    """Where tables go; wide where nobody's terminal bounds it."""
    from hpcdl.runs import terminal

    made = terminal.console(highlight=False, emoji=False)
    if not made.is_terminal:
        made.width = max(made.width, 160)  # whoever reads a file or a pipe wants whole lines
    return made


def say(line: str) -> None:
    """A line on standard output."""
    from hpcdl.runs import terminal

    print(terminal.line(line))


def print_json(value: object) -> None:
    """A value for scripts."""
    import json

    say(json.dumps(value, indent=1, ensure_ascii=False))


def aside(line: str) -> None:
    """A line on standard error."""
    from hpcdl.runs import terminal

    print(terminal.line(line, to=sys.stderr), file=sys.stderr, flush=True)


def remark(line: str) -> None:
    """A remark beside the log: on standard error, so that a pipe gets the log only."""
    sys.stdout.flush()
    aside(f"[{line}]")


def left_out(faults: Sequence[str]) -> None:
    """Runs that could not be read, and why."""
    for fault in faults:
        aside(f"hpcdl: left out: {fault}")


def confirmed(number: int, verb: str, done: str) -> bool:
    """Asks on a terminal.

    Raises:
        UsageError: there is nobody to ask.
    """
    if not sys.stdin.isatty():
        raise UsageError(f"{number} runs would be {done}: say --yes")
    return input(f"{verb} {number} runs? [y/N] ").strip().lower() in ("y", "yes")
