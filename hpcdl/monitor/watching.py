"""The agent's side of the search for leaks: it takes each sample, asks a process that grows to look, and tells.

What grows without an end looks like a cache that is not yet full, so an agent takes its time where time costs nothing:
it tells of a leak once the growth has gone on for a tenth longer than it took to see it, and

    half of the run's steps are done (a cache that fills in one of several epochs is full by then), or
    a quarter of the way to full memory is done and the run would come to its end, or
    it has gone on for `_SURE` samples.

Then, before it is told, the process that grows looks which of its lines and tensors do (hpcdl.worker.growth), and
whether what grows is in use at all: memory that its allocator holds free is no leak. Nothing here ends a run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hpcdl.errors import HpcdlError
from hpcdl.monitor import leaks, looking
from hpcdl.monitor.leaks import MIB, Growth, Rules
from hpcdl.monitor.looking import Answer, Growing
from hpcdl.monitor.records import NodeSample
from hpcdl.monitor.series import Gathered, Series, Who
from hpcdl.runs.store import RunDir
from hpcdl.secrets import hide

_SURE = 240
"""Samples of growth that are told of whatever is left: 20 minutes at the usual 5 s."""
_LONGER = 1.1
"""How much longer than it took to be seen a growth has to go on."""
_WAY = 0.25
"""Share of the way to full memory after which one doesn't wait for half of the run."""
_LOOKS = 3
"""Times that a process is asked; each costs it some steps of tracing."""
_LOOK_BYTES = MIB
_LOOK_STEPS = (16, 200)
"""A look goes on until this much has grown, within these bounds."""
_PATIENCE, _PATIENCE_S = 120, 60.0
"""Samples and seconds that an answer may take, whichever is longer; at most half of the way to full memory."""
_HELD, _IN_USE = 0.6, 0.25
"""Free memory grows by this share of the growth, memory in use by less than that: it is the allocator's."""
_WORSE = 2.0
"""Times as fast as was told: told again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What of a spec the search needs."""

    rules: Rules = leaks.USUAL
    look: bool = True
    """Whether processes may be asked."""
    last_step: int | None = None

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Settings | None:
        """From spec.yaml as plain data, of any version; None: nobody looks for leaks."""
        monitor, trainer = spec.get("monitor", {}), spec.get("trainer", {})
        if monitor.get("name", "none") == "none" or not monitor.get("leaks", True):
            return None
        least = int(float(monitor.get("leak_min_mib", 1.0)) * MIB)
        return cls(
            rules=replace(leaks.USUAL, least_bytes=least),
            look=bool(monitor.get("leak_look", True)),
            last_step=trainer.get("max_steps"),
        )


@dataclass(slots=True)
class _Case:
    """What is known of one process's growth."""

    judged: int = 0
    """Samples when it was judged last."""
    since: int | None = None
    """Samples when its growth was first seen; None: it doesn't grow."""
    growth: Growth | None = None
    left: float | None = None
    """Steps until memory is full."""
    step_s: float | None = None
    looks: int = 0
    asked: int | None = None
    """Samples when it was asked; None: no answer is awaited."""
    asked_at: float = 0.0
    pid: int | None = None
    """Who was asked."""
    answer: Answer | None = None
    told: float = 0.0
    """Bytes a step that were told."""


class Watcher:
    """Looks for leaks on one node in one try.

    Args:
        settings: what is taken for one; None: nobody looks.
        run: where it is told.
        node: this node's name.
        attempt: the try.
        folder: the agent's, for questions.
        say: writes into the node's log.
    """

    def __init__(
        self,
        settings: Settings | None,
        run: RunDir,
        node: str,
        attempt: str,
        folder: Path,
        say: Callable[[str], None],
    ) -> None:
        self._settings, self._run, self._node, self._attempt = settings, run, node, attempt
        self._folder, self._say = folder, say
        self._gathered = Gathered()
        self._cases: dict[Who, _Case] = {}

    def take(self, sample: NodeSample) -> None:
        """One more sample; tells what it proves."""
        if self._settings is None:
            return
        self._gathered.take(sample)
        for who, series in list(self._gathered.judged()):
            case = self._cases.setdefault(who, _Case())
            if case.asked is not None:  # what the look itself takes is no growth
                self._hear(who, series, case)
            elif series.seen >= max(self._settings.rules.samples, case.judged * 1.04):
                self._judge(self._settings, who, series, case, sample)
        for who, series in self._gathered.take_out_ended().items():
            self._lose(who, series)

    def close(self) -> None:
        """The try is over: what is known by now is told."""
        for who, series in self._gathered.judged():
            self._lose(who, series)

    def _lose(self, who: Who, series: Series) -> None:
        """A process has ended, maybe while it looked: there is nothing more to wait for."""
        case = self._cases.pop(who, None)
        if self._settings is None or case is None:
            return
        if case.asked is None:
            growth = leaks.judge(series.points, self._settings.rules)
            if not growth.leak or growth.interval[0] <= _WORSE * case.told:
                return
            case.growth, case.answer = growth, None
        self._tell(who, case)

    def _judge(self, settings: Settings, who: Who, series: Series, case: _Case, sample: NodeSample) -> None:
        case.judged = series.seen
        growth = leaks.judge(series.points, settings.rules)
        if not growth.leak:
            case.since = None
            return
        case.growth, case.since = growth, case.since or series.seen
        case.left, case.step_s = self._until_full(who, growth, sample), series.step_s
        if growth.interval[0] <= _WORSE * case.told or not self._is_ripe(settings, series, case):
            return
        if not (settings.look and self._ask(who, series, case)):
            self._tell(who, case)

    def _is_ripe(self, settings: Settings, series: Series, case: _Case) -> bool:
        """Whether there is no more to wait for."""
        assert case.growth is not None and case.since is not None
        seen = case.growth.last_step - case.growth.first_step
        if case.left is not None and case.left < _WAY * seen:
            return True
        if series.seen < _LONGER * case.since:
            return False
        last, done = settings.last_step, series.last_step
        if last is None or done >= last / 2 or series.seen >= _SURE:
            return True
        return case.left is not None and case.left <= last - done and seen >= _WAY * (case.left + seen)

    def _ask(self, who: Who, series: Series, case: _Case) -> bool:
        """The process itself, or of a loader's workers the one that grows most; False: nobody to ask."""
        assert case.growth is not None
        pid = who.pid
        if who.role == "loader" and pid is None:
            each = self._gathered.of_loaders(who.rank).items()
            slopes = {one.pid: leaks.judge(its.points).bytes_per_step for one, its in each}
            pid = max(slopes, key=lambda one: slopes[one], default=None)
        if pid is None or case.looks >= _LOOKS:
            return False
        fewest, most = _LOOK_STEPS
        steps = int(min(most, max(fewest, _LOOK_BYTES / max(case.growth.bytes_per_step, 1.0))))
        case.looks += 1
        case.pid = pid
        if not looking.ask(self._folder, pid, steps):
            return False
        case.asked, case.asked_at = series.seen, time.monotonic()
        return True

    def _hear(self, who: Who, series: Series, case: _Case) -> None:
        """Takes an answer that has come, or gives up on it."""
        assert case.asked is not None and case.growth is not None and case.pid is not None
        case.answer = looking.read(self._folder, case.pid)
        late = case.left is not None and series.last_step > case.growth.last_step + case.left / 2
        waits = series.seen < case.asked + _PATIENCE or time.monotonic() < case.asked_at + _PATIENCE_S
        if case.answer is None and waits and not late:
            return
        held = held_free(who, case.growth, case.answer) if case.answer else ""
        doubted = case.looks == 1 and case.answer is not None and grows_no_more(case.growth, case.answer)
        if held:
            self._say(f"{who.words} grows by {size(case.growth.bytes_per_step)} a step, but {held}: no leak")
        elif not doubted:  # else it is told once it has been proved anew
            self._tell(who, case)
        # The look has left its traces in the process's memory: what follows is a series of its own.
        self._gathered.forget(who)
        case.asked, case.since, case.judged = None, None, 0

    def _until_full(self, who: Who, growth: Growth, sample: NodeSample) -> float | None:
        """Steps, if all that leaks on this node goes on as it does."""
        together = sum(
            case.growth.bytes_per_step
            for other, case in self._cases.items()
            if case.growth and case.since and other.memory == who.memory == "host"
        )
        return leaks.steps_until_full(who, max(growth.bytes_per_step, together), sample)

    def _tell(self, who: Who, case: _Case) -> None:
        assert case.growth is not None
        case.told = case.growth.bytes_per_step
        found = Leak(
            node=self._node, attempt=self._attempt, who=replace(who, pid=case.pid if who.pid is None else who.pid),
            growth=case.growth, steps_until_full=case.left, step_s=case.step_s,
            growing=parts(who, case.growth, case.answer), look=case.answer,
        )  # fmt: skip
        with contextlib.suppress(OSError, HpcdlError):
            self._run.event("leak", **found.event())
        self._say(f"warning: {found.message}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak(leaks.Verdict):
    """A leak that is told of."""

    growing: tuple[Growing, ...]
    """What grows, the most first."""
    look: Answer | None
    """What the process has said; None: it wasn't asked, or hasn't answered."""

    @property
    def full_at(self) -> str | None:
        """When memory will be full; UTC, ISO 8601, to the second."""
        if self.steps_until_full is None or self.step_s is None:
            return None
        ahead = min(self.steps_until_full * self.step_s, 10 * 365 * 86400.0)
        return (datetime.now(UTC) + timedelta(seconds=ahead)).isoformat(timespec="seconds")

    @property
    def message(self) -> str:
        """One line."""
        low, high = self.growth.interval
        on = "GPU memory" if self.who.memory == "gpu" else "memory"
        text = f"{self.who.words} on {self.node} leaks {size(self.growth.bytes_per_step)} of {on} a step"
        text += f" ({size(low)} to {size(high)})"
        if self.steps_until_full is not None:
            text += f": full in {self.steps_until_full:,.0f} steps"
            text += f", {self.full_at[:16].replace('T', ' ')} UTC" if self.full_at else ""
        named = [f"{part.where} {part.what.partition(', from ')[0]}".strip() for part in self.growing[:1]]
        return f"{text}; {named[0]}" if named else text

    def event(self) -> dict[str, Any]:
        """What stands in events.jsonl."""
        low, high = self.growth.interval
        details: dict[str, Any] = {
            "message": self.message,
            "node": self.node,
            "process": {"role": self.who.role, "rank": self.who.rank, "pid": self.who.pid},
            "memory": self.who.memory,
            "step": int(self.growth.last_step),
            "bytes_per_step": round(self.growth.bytes_per_step, 1),
            "interval": [round(low, 1), round(high, 1)],
            "steps_until_full": None if self.steps_until_full is None else int(self.steps_until_full),
            "full_at": self.full_at,
            "growing": [
                {
                    "what": hide(part.what),
                    "where": part.where,
                    "bytes_per_step": round(part.bytes_per_step, 1),
                }
                for part in self.growing
            ],
            "try": self.attempt,
        }
        if self.look is not None:
            steps = [self.look.first_step, self.look.last_step]
            details["look"] = {"steps": steps, "took_s": self.look.took_s}
        return details


def held_free(who: Who, growth: Growth, answer: Answer) -> str:
    """Why growth is the allocator's own: what is in use between steps doesn't grow; empty: it isn't."""
    least = _HELD * growth.bytes_per_step
    if who.memory == "gpu":
        used, held = answer.cuda_allocated, answer.cuda_reserved
        free = None if used is None or held is None else held - used
        whose = "torch's allocator"
    else:
        used, free, whose = answer.malloc_used, answer.malloc_free, "malloc"
        used = None if used is None else max(used, answer.python or 0.0)
    if used is None or free is None or free < least or used > _IN_USE * growth.bytes_per_step:
        return ""
    return f"{whose} holds it free for later ({size(free)} a step; in use {size(max(0.0, used))})"


def grows_no_more(growth: Growth, answer: Answer) -> bool:
    """Whether nothing has grown while the process looked: the growth has ended, or comes in jumps."""
    if answer.note or answer.malloc_used is None:
        return False
    found = [answer.resident, answer.malloc_used, answer.python, answer.cuda_allocated, answer.cuda_reserved]
    found.append(sum(each.bytes_per_step for each in answer.growing))
    return max(each or 0.0 for each in found) < _IN_USE * growth.bytes_per_step


def parts(who: Who, growth: Growth, answer: Answer | None) -> tuple[Growing, ...]:
    """What grows, as far as the process could tell, and what is left of the growth without a name."""
    if answer is None:
        return (
            Growing(
                what="not known: the process was not asked, or hasn't answered",
                bytes_per_step=growth.bytes_per_step,
            ),
        )
    named = answer.growing
    if answer.note:
        return (*named, Growing(what=f"not known: {answer.note}", bytes_per_step=growth.bytes_per_step))
    rest = growth.bytes_per_step - sum(each.bytes_per_step for each in named)
    if rest < 0.3 * growth.bytes_per_step:
        return named
    if who.memory == "gpu":
        what = "GPU memory that torch's allocator doesn't know of (a library's, NCCL's)"
        if (answer.cuda_allocated or 0.0) > 0.5 * rest:
            what = "torch tensors that were made in C++"
    elif (answer.malloc_used or 0.0) > 0.5 * rest:
        what = "C or C++: in use through malloc, and neither Python's nor a tensor's"
    else:
        what = "C or C++: neither through malloc nor Python's nor a tensor's (mmap, another allocator)"
    return tuple(
        sorted((*named, Growing(what=what, bytes_per_step=rest)), key=lambda one: -one.bytes_per_step)
    )


def size(count: float) -> str:
    """`1.53 MiB`: three digits, for rates."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
