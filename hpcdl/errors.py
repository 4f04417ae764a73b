"""Everything that hpcdl raises on purpose.

    HpcdlError                  a user can read its message and act on it; no traceback is shown
    ├── ConfigError             the config is wrong: all faults at once          exit 2
    ├── UsageError              a command was called wrongly (no such run, …)    exit 2
    ├── RunFailedError          the run itself failed                            exit 1
    │   ├── SupersededError     a newer try has taken the run over               exit 1
    │   └── NotFitError         a node lacks what the run needs (preflight)      exit 1
    ├── UnsavedError            the disk didn't take what a run must leave       exit 1
    ├── ServerError             a tracker's server could not be reached          exit 3
    └── SchedulerError          the scheduler could not be reached, or refused   exit 3

Anything else that reaches the user is a bug of ours, and keeps its traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LONGEST = 2000
"""Characters of one line of a page of faults."""
_UNREADABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What ends a line, acts on a terminal, turns the direction of a text, or is no text in UTF-8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong with a config."""

    key: str
    """Dotted key, as the user would write it on the command line: `trainer.max_steps`."""
    value: str
    """What was given, as text; empty where nothing was."""
    problem: str
    """What is wrong, in one sentence without a full stop."""
    allowed: str = ""
    """What is allowed: a type, a range, a list of names."""
    nearest: str = ""
    """The nearest valid name, where the value or key looks like a slip of the pen."""
    fix: str = ""
    """What to type instead."""
    fixes: tuple[str, ...] = ()
    """Several ways out, where there are: what to type, a line each."""
    where: str = ""
    """The sweep point that it was found in; empty for a single run."""


class HpcdlError(Exception):
    """Base of all errors that a user can cause; `exit_code` is the process's."""

    exit_code = 1


class ConfigError(HpcdlError):
    """The config is wrong. Carries every fault that was found, not only the first."""

    exit_code = 2

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults: tuple[Fault, ...] = tuple(faults)
        super().__init__(format_faults(self.faults))


class UsageError(HpcdlError):
    """A command was called with something that doesn't exist or doesn't fit."""

    exit_code = 2


class RunFailedError(HpcdlError):
    """The run was started and failed; the message holds the reason."""

    exit_code = 1


class SupersededError(RunFailedError):
    """A try of a run may write nothing any more: a newer one holds the run (hpcdl.runs.fence)."""


class NotFitError(RunFailedError):
    """A node lacks something that the run needs.

    Args:
        node: its name.
        problems: what it lacks, a sentence each.
        shared: whether it is the disk that all nodes share which is at fault, and no node.
    """

    def __init__(self, node: str, problems: Iterable[str], *, shared: bool = False) -> None:
        super().__init__(f"preflight on node {node}: {'; '.join(problems)}")
        self.node = node
        self.shared = shared


class UnsavedError(HpcdlError):
    """The disk didn't take what a run must leave: its last checkpoint, or its result. It says what is kept."""

    exit_code = 1


class LostPeerError(HpcdlError):
    """Another rank of the run doesn't answer: it may be slow, stopped, gone, or cut off."""


class ServerError(HpcdlError):
    """A tracker's server could not be reached, or doesn't take what it is sent."""

    exit_code = 3


class SchedulerError(HpcdlError):
    """The scheduler could not be reached, or refused the job; the message holds its own words."""

    exit_code = 3


def nearest_name(name: str, names: Iterable[str]) -> str:
    """The valid name that `name` was probably meant to be, or an empty string."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return found[0] if found else ""


def format_faults(faults: Sequence[Fault]) -> str:
    """All faults as one page of plain text, the same in a terminal, a log and a test; without secrets."""
    count = len(faults)
    lines = [f"The config has {count} fault{'s' if count != 1 else ''}; nothing was submitted.", ""]
    for number, fault in enumerate(faults, start=1):
        given = f" = {_shown(fault.value)}" if fault.value else ""
        lines.append(f"{number}. {_shown(fault.key)}{given}")
        for label, text in (
            ("problem", fault.problem),
            ("allowed", fault.allowed),
            ("nearest", fault.nearest),
            ("fix", fault.fix),
            ("in", fault.where),
        ):
            if text:
                lines.append(f"   {label + ':':<9}{_shown(text)}")
            if label == "fix":
                lines += [
                    f"   {'' if place or text else 'fix:':<9}{_shown(one)}"
                    for place, one in enumerate(fault.fixes)
                ]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _shown(text: str) -> str:
    """One line that can be read: what acts on a terminal is spelled out, a long text is cut."""
    from hpcdl import secrets  # only where there is something to say

    # Before it is cut: of a secret that was cut in two, nobody would know the half.
    text = _UNREADABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), secrets.mask(text))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text)} characters)"
