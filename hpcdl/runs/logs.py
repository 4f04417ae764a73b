"""`hpcdl logs`: what a run's ranks have printed, of all nodes in the order of time."""

from __future__ import annotations

import heapq
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcdl.errors import UsageError
from hpcdl.runs import failure
from hpcdl.runs.hurry import hurry
from hpcdl.runs.judge import NO_LOG
from hpcdl.runs.reconcile import View, look
from hpcdl.runs.scheduler import Slurm
from hpcdl.runs.state import ACTIVE
from hpcdl.runs.store import RunDir
from hpcdl.runs.tail import Tail

READ_EVERY_S = 0.5
ASK_EVERY_S = 5.0
_LINE = re.compile(r"(\d{4}-\d\d-\d\dT[\d:.]+\S*) \[(?:rank (\d+)|\w+)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which lines."""

    node: str | None = None
    rank: int | None = None
    attempt: str | None = None
    """A try: `<attempt>.<requeue>`, or an attempt (all its requeues)."""

    def file(self, path: Path) -> bool:
        """Whether a log file can hold such lines."""
        node, _, name = path.name.removesuffix(".log").rpartition("-try")
        if self.node is not None and node != self.node:
            return False
        return self.attempt is None or name == self.attempt or name.partition(".")[0] == self.attempt

    def line(self, line: str) -> bool:
        """Whether this is such a line; the agent's and torchrun's own are no rank's."""
        if self.rank is None:
            return True
        found = _LINE.match(line)
        return found is not None and found.group(2) == str(self.rank)


def show(run: RunDir, wanted: Wanted, write: Callable[[str], None], say: Callable[[str], None]) -> None:
    """Prints what there is now.

    Args:
        run: the run.
        wanted: which lines.
        write: takes each line of the log.
        say: takes a remark that is no part of the log.
    """
    view = look(run)
    files = _files(run, wanted)
    if not files:
        _show_nothing(view, wanted, write, say)
        return
    merged = False
    tries = sorted({failure.log_try(path) for path in files})
    for number in tries:
        if len(tries) > 1:
            say(f"try {number[0]}.{number[1]}")
        for line in merge([_lines(path) for path in files if failure.log_try(path) == number]):
            if wanted.line(line):
                merged = True
                write(line)
    if not merged:
        say("the log is still empty" if wanted.rank is None else f"no line of rank {wanted.rank} (yet)")


def follow(
    run: RunDir,
    wanted: Wanted,
    write: Callable[[str], None],
    say: Callable[[str], None],
    *,
    slurm: Slurm | None = None,
    read_every_s: float = READ_EVERY_S,
    ask_every_s: float = ASK_EVERY_S,
) -> View:
    """Prints lines as they come, over requeues and new nodes, until the run is over; returns how it ended."""
    slurm = slurm or Slurm()
    tails: dict[Path, Tail] = {}
    said = ""
    asked = float("-inf")
    while True:
        if time.monotonic() - asked >= ask_every_s or run.read_state().state not in ACTIVE:
            view, asked = hurry([look(run, slurm)], slurm)[0], time.monotonic()
        over = view.state.state not in ACTIVE
        for path in _files(run, wanted):
            tails.setdefault(path, Tail(path))
        for line in merge([tail.lines() for tail in tails.values()]):
            if wanted.line(line):
                write(line)
        if over:
            break
        remark = f"{view.state.state}: {view.state.reason}" if view.state.reason else ""
        if remark and remark != said:
            say(remark)
        said = remark
        time.sleep(read_every_s)
    for tail in tails.values():
        if tail.rest() and wanted.line(tail.rest()):
            write(tail.rest())
    if not tails:
        _show_nothing(view, wanted, write, say)
    say(f"{view.state.state}{': ' + view.state.reason if view.state.reason else ''}")
    return view


def merge(sources: Sequence[Iterable[str]]) -> Iterator[str]:
    """Lines of several nodes in the order of their times; one without a time stays behind its forerunner."""
    if len(sources) == 1:
        return iter(sources[0])
    return (line for _, _, _, line in heapq.merge(*(_timed(i, lines) for i, lines in enumerate(sources))))


def _timed(source: int, lines: Iterable[str]) -> Iterator[tuple[str, int, int, str]]:
    """Keys to merge by; times never fall within a source, whatever its clock does, so its order is kept."""
    latest = ""
    for number, line in enumerate(lines):
        found = _LINE.match(line)
        if found:
            latest = max(latest, found.group(1))
        yield latest, source, number, line


def _files(run: RunDir, wanted: Wanted) -> list[Path]:
    return [path for path in failure.log_files(run) if wanted.file(path)]


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            yield line.rstrip("\n")


def _show_nothing(
    view: View, wanted: Wanted, write: Callable[[str], None], say: Callable[[str], None]
) -> None:
    """Why there is no log: a wrong name, not started yet, never going to, or failed before the agent."""
    run, state = view.run, view.state
    existing = failure.log_files(run)
    if existing:
        names = ", ".join(path.name for path in existing)
        raise UsageError(f"no log of that node or try; there are: {names}")
    output = failure.own_output(run, state)
    if output is not None and output.stat().st_size:
        say(f"the agent wrote no log; this is the job's own output, {output}")
        for line in _lines(output):
            write(line)
    elif state.state == "CANCELLED":
        say(f"no log: {state.reason or 'cancelled while pending; ' + NO_LOG}")
    elif state.state in ACTIVE:
        why = f" ({state.reason})" if state.reason else ""
        say(f"no log yet: {state.state}{why}; hpcdl logs -f {state.run_id} waits for it")
    else:
        say(f"no log: {state.state}{' (' + state.reason + ')' if state.reason else ''}")
