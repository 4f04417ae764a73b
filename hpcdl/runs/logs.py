"""`hpcdl logs`: what a run's ranks have printed, of all nodes in the order of time."""

from __future__ import annotations

import heapq
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcdl.errors import SchedulerError, UsageError
from hpcdl.runs import failure, first, words
from hpcdl.runs.hurry import hurry
from hpcdl.runs.judge import NO_LOG
from hpcdl.runs.reconcile import View, look
from hpcdl.runs.scheduler import Slurm
from hpcdl.runs.state import ACTIVE
from hpcdl.runs.store import RunDir
from hpcdl.runs.tail import Tail

READ_EVERY_S = 0.5
ASK_EVERY_S = 5.0
SETTLE_S = 1.5
"""After a run's end: agents say their last words once it is written down, and other nodes' come late over NFS."""
SETTLE_MOST_S = 10.0
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
    if view.state.state not in (*ACTIVE, "COMPLETED", "CANCELLED") and first.of_run(run) is not None:
        say(f"hpcdl logs {view.state.run_id} --error shows the first error")
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
    settle_s: float = SETTLE_S,
) -> View:
    """Prints lines as they come, over requeues and new nodes, until the run is over; returns how it ended."""
    slurm = slurm or Slurm()
    stream = Stream(run, wanted, write, say)
    said = ""
    asked = float("-inf")
    while True:
        if time.monotonic() - asked >= ask_every_s or run.read_state().state not in ACTIVE:
            view, asked = hurry([look(run, slurm)], slurm)[0], time.monotonic()
        stream.read()
        if view.state.state not in ACTIVE:
            break
        remark = f"{view.state.state}: {view.state.reason}" if view.state.reason else ""
        if remark and remark != said:
            say(remark)
        said = remark
        time.sleep(read_every_s)
    _settle(stream, view, read_every_s, settle_s)
    stream.end()
    if not stream.has_files:
        _show_nothing(view, wanted, write, say)
    say(f"{view.state.state}{': ' + view.state.reason if view.state.reason else ''}")
    if view.state.state not in ("COMPLETED", "CANCELLED") and first.of_run(run) is not None:
        say(f"hpcdl logs {view.state.run_id} --error shows the first error")
    return view


def _settle(stream: Stream, view: View, read_every_s: float, settle_s: float) -> None:
    """Waits until nothing more comes, where the run has only just ended."""
    if words.since(view.state.ended) > SETTLE_MOST_S:
        return
    quiet_since = began = time.monotonic()
    while time.monotonic() - quiet_since < settle_s and time.monotonic() - began < SETTLE_MOST_S:
        time.sleep(read_every_s)
        if stream.read():
            quiet_since = time.monotonic()


class Stream:
    """A run's lines as they come, of all nodes and tries, in the order of their times.

    A node's lines may come to light later than another one's: each line waits for one more look at all files. What
    comes later than that is shown late, and never left out.

    Args:
        run: the run.
        wanted: which lines.
        write: takes each line.
        say: takes a remark: where another try begins.
    """

    def __init__(
        self, run: RunDir, wanted: Wanted, write: Callable[[str], None], say: Callable[[str], None]
    ) -> None:
        self._run, self._wanted = run, wanted
        self._write, self._say = write, say
        self._tails: dict[Path, Tail] = {}
        self._latest: dict[Path, str] = {}
        """The time of each file's last line."""
        self._held: list[tuple[str, int, Path, str]] = []
        """Lines that wait: time, number, file, text."""
        self._count = 0
        self._try: tuple[int, int] | None = None

    @property
    def has_files(self) -> bool:
        """Whether there was any log."""
        return bool(self._tails)

    def read(self) -> bool:
        """Prints what has waited, and takes in what is new; whether there was any."""
        ripe = max((time for time, *_ in self._held), default="")
        for path in _files(self._run, self._wanted):
            self._tails.setdefault(path, Tail(path))
        several = len(self._tails) > 1
        before = self._count
        for path, tail in self._tails.items():
            for line in tail.lines():
                self._take(path, line)
        self._print(until=ripe if several else None)
        return self._count > before

    def end(self) -> None:
        """Prints what is left, and lines that have no end: their writer was killed."""
        for path, tail in self._tails.items():
            if tail.rest():
                self._take(path, tail.rest())
        self._print(until=None)

    def _take(self, path: Path, line: str) -> None:
        found = _LINE.match(line)
        latest = self._latest.get(path, "")
        if found:  # times never fall within a file, whatever its node's clock does: its order is kept
            latest = self._latest[path] = max(latest, found.group(1))
        self._count += 1
        self._held.append((latest, self._count, path, line))

    def _print(self, until: str | None) -> None:
        self._held.sort(key=lambda held: held[:2])
        count = len(self._held) if until is None else sum(held[0] <= until for held in self._held)
        ripe, self._held = self._held[:count], self._held[count:]
        for _, _, path, line in ripe:
            if not self._wanted.line(line):
                continue
            number = failure.log_try(path)
            if self._try is not None and number > self._try:
                self._say(f"try {number[0]}.{number[1]}")
            self._try = max(number, self._try or number)
            self._write(line)


def show_error(run: RunDir, write: Callable[[str], None], say: Callable[[str], None]) -> None:
    """Prints what the last failure comes from: the first error of the first failing rank, and what stood around it.

    Args:
        run: the run.
        write: takes each line.
        say: takes a remark: that the run has gone on since, or that there is no error.
    """
    view = look(run)
    found = first.of_run(run)
    state = view.state
    if found is None:
        why = f"; {state.state}{': ' + state.reason if state.reason else ''}"
        say(f"no rank or agent has left an error{why if state.state not in ACTIVE else ''}")
        return
    for line in first.in_words(found, state.run_id):
        write(line)
    if state.state in (*ACTIVE, "COMPLETED", "CANCELLED"):
        say(f"the run has gone on since: it is {state.state}")


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


def _show_pods(view: View, wanted: Wanted, write: Callable[[str], None], say: Callable[[str], None]) -> bool:
    """What the pods have printed, where this machine doesn't see their volume; whether there was anything."""
    from hpcdl.runs.kube import look as in_cluster  # few have any

    try:
        found = in_cluster.pod_logs(view.run, view.state)
    except SchedulerError as error:
        say(f"the pods' logs can't be had: {error}")
        return True
    chosen = {name: text for name, text in found.items() if text and _is_of(name, wanted.node)}
    for line in merge([text.splitlines() for text in chosen.values()]):
        if wanted.line(line):
            write(line)
    return bool(chosen)


def _is_of(pod: str, node: str | None) -> bool:
    """Whether a pod, whose name ends with five letters of Kubernetes', is that node."""
    return node is None or pod == node or pod.rpartition("-")[0] == node


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
    if state.kind == "kubernetes" and _show_pods(view, wanted, write, say):
        return
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
