"""One run, read as its files grow: a look costs a few `stat` where nothing has changed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

from hpcdl.monitor.records import NodeSample, of_line
from hpcdl.runs import words
from hpcdl.runs.feed import Progress
from hpcdl.runs.private import open_to_read
from hpcdl.runs.reconcile import View
from hpcdl.runs.state import ACTIVE, RunState
from hpcdl.runs.store import RunDir
from hpcdl.runs.tail import Tail, as_record
from hpcdl.top.curve import Curve
from hpcdl.top.warnings import Warning, Warnings

WINDOW = 1 << 15
"""Bytes of metrics' end that the first look reads."""
EVENTS_WINDOW = 1 << 17
"""The same of events."""
SAMPLES_WINDOW = 1 << 18
"""The same of a node's samples: a line may hold a thousand processes."""
GLIMPSES = 48
"""Places before the window at which the first look reads a line of metrics, so that the curve is the whole run's."""
GLIMPSE = 2048
"""Bytes read at each."""
LATE_S = 60.0
"""A run that has ended may get lines for so long: other nodes' agents, a slow file system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What a node's last two samples say."""

    sample: NodeSample
    before: NodeSample | None = None

    @property
    def used_bytes(self) -> int | None:
        """What the run holds here; shared pages counted once where that was looked at."""
        return self.sample.rss_bytes if self.sample.pss_bytes is None else self.sample.pss_bytes

    @property
    def share(self) -> float | None:
        """Of its limit, what is used by whoever; None where that isn't known."""
        limit, left = self.sample.memory_limit_bytes, self.sample.memory_available_bytes
        if not limit:
            return None
        used = limit - left if left is not None else self.used_bytes
        return None if used is None else max(0.0, used / limit)

    def rate(self, name: str) -> float | None:
        """Units a second of a sample's count that only grows; None where two samples don't tell.

        Args:
            name: the sample's field.
        """
        if self.before is None:
            return None
        seconds = words.between(self.before.time, self.sample.time)
        old, new = getattr(self.before, name), getattr(self.sample, name)
        if seconds <= 0 or old is None or new is None or new < old:
            return None
        return float(new - old) / seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A run as far as its files tell."""

    view: View
    step: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    step_s: float | None = None
    """Of the last step."""
    left_s: float | None = None
    """What the remaining steps will take."""
    peak_bytes: int | None = None
    """What rank 0 has held at most, by its own account."""
    curve: tuple[tuple[int, float], ...] = ()
    """(step, loss)."""
    nodes: tuple[Node, ...] = ()
    """Those of the present try that have written samples, by name."""
    warnings: tuple[Warning, ...] = ()
    last_line: str = ""
    """When the last line of metrics was written (UTC, ISO 8601)."""
    unread: bool = False
    """Whether nothing but the state has been read yet."""

    @property
    def state(self) -> RunState:
        """Its state as it stands now."""
        return self.view.state

    @property
    def live(self) -> tuple[Node, ...]:
        """The nodes, while it goes on: the last samples of a run that has ended are of its end."""
        return self.nodes if self.state.state in ACTIVE else ()

    @property
    def fullest(self) -> Node | None:
        """The node with the least room left, or with the most in use where limits aren't known."""
        known = [node for node in self.live if node.used_bytes is not None]
        return max(known, key=lambda node: (node.share or 0.0, node.used_bytes or 0), default=None)

    @property
    def cpu_percent(self) -> float | None:
        """Of one core, over all nodes."""
        known = [n.sample.cpu_percent for n in self.live if n.sample.cpu_percent is not None]
        return sum(known) if known else None

    @property
    def gpu_percent(self) -> float | None:
        """The mean over all GPUs of all nodes."""
        known = [g.percent for n in self.live for g in n.sample.gpus if g.percent is not None]
        return sum(known) / len(known) if known else None


class RunReader:
    """Reads one run's files.

    Args:
        run: the run.
    """

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.state: RunState | None = None
        """As state.json has it; None before the first look."""
        self._stamp: tuple[int, int, int] | None = None
        self._files: _Files | None = None
        self._row: Row | None = None

    def look(self, submissions: dict[str, dict[str, Any]]) -> RunState:
        """The state, read anew only where its file has changed, or where its job isn't known yet.

        Args:
            submissions: as `RunDir.read_state` wants it; one dict for all runs of a look.

        Raises:
            FileNotFoundError: the run is gone.
            UsageError: its state can't be read.
            OSError: its folder can't be.
        """
        found = os.stat(self.run.state_file)  # noqa: PTH116 (thousands of them)
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        state = self.state
        unsent = state is not None and state.job_id is None and state.submission is not None
        if state is None or stamp != self._stamp or (unsent and state.state in ACTIVE):
            self.state = self.run.read_state(submissions)
            self._stamp = stamp
        assert self.state is not None
        return self.state

    @property
    def has_read(self) -> bool:
        """Whether more than the state has been read."""
        return self._row is not None

    def row(self, view: View) -> Row:
        """All that its files tell now.

        Args:
            view: how the run stands.

        Raises:
            OSError: a file can't be read.
        """
        state = view.state
        ended = state.state not in ACTIVE and words.since(state.ended) > LATE_S
        same = self._row is not None and self._row.view == view
        if self._row is not None and same and ended:
            return self._row
        if self._files is None:
            self._files = _Files(self.run)
        if self._files.read() or not same or self._row is None:
            self._row = self._files.row(view)
        return self._row


class _Files:
    """What metrics, events and samples have told so far."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._metrics = Tail(run.metrics_file, window=WINDOW, glance=True)
        self._events = Tail(run.events_file, window=EVENTS_WINDOW, glance=True)
        self._samples: dict[str, Tail] = {}
        self._folder = 0
        self._progress = Progress()
        self._curve = Curve()
        self._warnings = Warnings()
        self._nodes: dict[str, Node] = {}
        self._last_line = ""

    def read(self) -> bool:
        """Reads what was appended; whether there was anything."""
        return any([self._read_metrics(), self._read_events(), self._read_samples()])

    def row(self, view: View) -> Row:
        """What is known."""
        progress, state = self._progress, view.state
        running = state.state in ("RUNNING", "UNKNOWN")
        here = [self._nodes[name] for name in sorted(self._nodes)]
        return Row(
            view=view,
            step=progress.step,
            loss=progress.loss,
            tokens_per_s=_finite(progress.tokens_per_s),
            step_s=_finite(progress.step_times[-1]) if progress.step_times else None,
            left_s=_left_s(progress, state.max_steps) if running else None,
            peak_bytes=progress.memory_bytes,
            curve=self._curve.points(),
            nodes=tuple(node for node in here if _of_try(node.sample, state)),
            warnings=self._warnings.all(),
            last_line=self._last_line,
        )

    def _read_metrics(self) -> bool:
        records = self._metrics.records()
        if self._metrics.replaced:  # a try went on from a checkpoint, and what lay behind it is gone
            self._curve, self._progress = Curve(), Progress()
        if self._metrics.skipped and not self._curve.points():
            for record in _glimpses(self._run, self._metrics.skipped):
                self._take(record)
        for record in records:
            self._take(record)
        return bool(records) or self._metrics.replaced

    def _take(self, record: dict[str, Any]) -> None:
        if self._progress.take(record):
            self._curve.add(self._progress.step, self._progress.loss)
            self._last_line = str(record.get("time", ""))

    def _read_events(self) -> bool:
        events = self._events.records()
        for event in events:
            self._warnings.take(event)
        return bool(events)

    def _read_samples(self) -> bool:
        changed = os.stat(self._run.path).st_mtime_ns  # noqa: PTH116
        if changed != self._folder:  # a file was made: perhaps another node's
            for entry in os.scandir(self._run.path):
                name = entry.name
                if name.startswith("system-") and name.endswith(".jsonl") and name not in self._samples:
                    path = self._run.path / name
                    self._samples[name] = Tail(path, window=SAMPLES_WINDOW, glance=True)
            self._folder = changed
        found = False
        for name, tail in self._samples.items():
            with contextlib.suppress(OSError):  # one node's file; the others tell all the same
                lines = tail.lines()
                found = self._take_samples(name[len("system-") : -len(".jsonl")], lines) or found
        return found

    def _take_samples(self, node: str, lines: list[str]) -> bool:
        for line in lines[-2:]:
            record = as_record(line)
            if record is None:
                continue
            before = self._nodes.get(node)
            sample = _with_pss(of_line(record, node), before.sample if before else None)
            self._nodes[node] = Node(sample=sample, before=before.sample if before else None)
        return bool(lines)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _left_s(progress: Progress, max_steps: int) -> float | None:
    try:
        return _finite(progress.left_s(max_steps))
    except OverflowError:
        return None


def _with_pss(sample: NodeSample, before: NodeSample | None) -> NodeSample:
    """The sample; where PSS was not looked at, with that of the sample before (of processes that are still there)."""
    if before is None or sample.pss_bytes is not None or before.pss_bytes is None:
        return sample
    known = {each.pid: each.pss_bytes for each in before.processes}
    processes = tuple(
        each if each.pss_bytes is not None else dataclasses.replace(each, pss_bytes=known.get(each.pid))
        for each in sample.processes
    )
    return dataclasses.replace(sample, pss_bytes=before.pss_bytes, processes=processes)


def _of_try(sample: NodeSample, state: RunState) -> bool:
    """Whether a node's last sample is of the try that runs, or ran last."""
    if not sample.attempt or not state.running_try:
        return True
    return sample.attempt.split(".")[:2] == state.running_try.split(".")[:2]


def _glimpses(run: RunDir, size: int) -> list[dict[str, Any]]:
    """Lines here and there in the first `size` bytes of a run's metrics, in their order."""
    records = []
    with open_to_read(run.metrics_file) as file:
        for place in range(GLIMPSES):
            file.seek(size * place // GLIMPSES)
            lines = file.read(GLIMPSE).decode("utf-8", errors="replace").split("\n")[1:-1]
            found = (as_record(line) for line in lines)
            record = next((each for each in found if each is not None and "loss" in each), None)
            records += [record] if record is not None else []
    return records
