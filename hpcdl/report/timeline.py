"""A run's tries, as its events tell them: when each waited, started, trained, what happened in it and how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpcdl.runs import words
from hpcdl.runs.status import straggler

FAULTS = ("restarting", "requeued", "failed", "lost", "hang")
"""Events that tell of something that went wrong."""
ENDS = ("finished", "cancelled", "failed")
NOTES = {
    "checkpoint_failed": "checkpoint failed",
    "warning": "warning",
    "stopping": "asked to stop",
    "straggler": "straggler",
    "leak": "leak",
    "waits": "waits",
}
"""Events that are told as warnings, and what they are called."""


@dataclass(slots=True, kw_only=True)
class Mark:
    """One moment."""

    kind: str
    """`checkpoint`, `evaluation`, `resumed`, `fault`, `warning`."""
    time: str
    text: str
    step: int | None = None
    """The last step before it, where that is said."""


@dataclass(slots=True, kw_only=True)
class Span:
    """One stretch of a try."""

    kind: str
    """`queued`, `starting`, `running`; `lost`: what had to be done again, on top of the others."""
    start: str
    end: str

    @property
    def seconds(self) -> float:
        """How long it took."""
        return max(0.0, words.between(self.start, self.end))


@dataclass(slots=True, kw_only=True)
class Try:
    """One start of the run on its nodes."""

    number: str
    """`<attempt>.<requeue>`, as in the names of logs."""
    job_id: str = ""
    node_list: tuple[str, ...] = ()
    nodes: int = 1
    queued: str = ""
    """Since when it waited; empty for a try in place."""
    started: str = ""
    ended: str = ""
    """When its nodes were free again; of a try that is under way, the moment of the report."""
    active: bool = False
    first_step: int = 0
    """The step that it went on from."""
    last_step: int = 0
    outcome: str = ""
    """How it ended: `finished`, `cancelled`, `failed`, `requeued`, `restarted`, `lost`, `ended` (nobody
    has said how); empty while under way."""
    reason: str = ""
    """Why, in words."""
    spans: list[Span] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def seconds(self, kind: str) -> float:
        """Of all its stretches of a kind."""
        return sum(span.seconds for span in self.spans if span.kind == kind)


class _Reader:
    """Walks through the events."""

    def __init__(self, until: str, active: bool, lines: Sequence[Mapping[str, Any]]) -> None:
        self.tries: list[Try] = []
        self._until = until
        """The end of the run, or now."""
        self._active = active
        self._lines = lines
        self._now: Try | None = None
        self._waiting = ""
        self._ready = ""
        """Since when the try trains; empty while it starts."""
        self._since = ""
        """Start of the stretch that is under way."""
        self._pending: list[Mark] = []

    def read(self, events: Sequence[Mapping[str, Any]]) -> list[Try]:
        for event in events:
            kind, time = str(event.get("event", "")), str(event.get("time", ""))
            if words.parse(time) is None:
                continue
            handle = getattr(self, f"_on_{kind}", None)
            if handle is not None:
                handle(event, time)
            elif kind in NOTES:
                self._mark("warning", time, said(event))
        if self._now is not None:
            self._close(self._until, active=self._active, outcome="" if self._active else "ended")
        elif self._waiting and self._active and self._waiting < self._until:
            queued = Try(number="", queued=self._waiting, ended=self._until, active=True)
            queued.spans.append(Span(kind="queued", start=self._waiting, end=self._until))
            queued.marks += self._pending
            self.tries.append(queued)
        self._evaluations()
        return self.tries

    def _on_submitted(self, event: Mapping[str, Any], time: str) -> None:
        self._waiting = time

    def _on_started(self, event: Mapping[str, Any], time: str) -> None:
        if self._now is not None:  # the try before left no last word
            self._close(self._last_sign(self._now, time), outcome="lost")
        nodes = event.get("node_list")
        names = tuple(map(str, nodes)) if isinstance(nodes, list) else ()
        self._now = Try(
            number=str(event.get("try", "?")),
            job_id=str(event.get("job_id") or ""),
            node_list=names,
            nodes=_whole(event.get("nodes")) or len(names) or 1,
            queued=self._waiting,
            started=time,
            marks=self._pending,
        )
        if self._waiting:
            self._now.spans.append(Span(kind="queued", start=self._waiting, end=time))
        self._waiting, self._ready, self._since, self._pending = "", "", time, []

    def _on_loaded(self, event: Mapping[str, Any], time: str) -> None:
        if self._now is not None and not self._ready:
            self._now.spans.append(Span(kind="starting", start=self._since, end=time))
            self._ready = self._since = time

    def _on_resumed(self, event: Mapping[str, Any], time: str) -> None:
        step = _whole(event.get("step"))
        if self._now is not None:
            if not any(mark.kind in ("resumed", "fault") for mark in self._now.marks):
                self._now.first_step = step
            self._mark("resumed", time, f"resumed from step {step}")

    def _on_checkpoint(self, event: Mapping[str, Any], time: str) -> None:
        self._mark("checkpoint", time, f"checkpoint at step {event.get('step')}")
        if self._now is not None:
            self._now.last_step = max(self._now.last_step, _whole(event.get("step")))

    def _on_restarting(self, event: Mapping[str, Any], time: str) -> None:
        self._mark("fault", time, said(event), event.get("step"))
        if self._now is None:
            return
        self._now.last_step = max(self._now.last_step, _whole(event.get("step")))
        if event.get("in_place") == "job":
            self._close(time, outcome="restarted", reason=str(event.get("reason", "")), lost=True)
        else:
            self._end_stretch(time)
            _lose(self._now)
            self._ready = ""

    def _on_requeued(self, event: Mapping[str, Any], time: str) -> None:
        fault = event.get("kind") not in (None, "timeout", "preempted")
        if self._now is not None:
            self._now.last_step = max(self._now.last_step, _whole(event.get("step")))
        self._mark("fault" if fault else "warning", time, said(event), event.get("step"))
        self._close(time, outcome="requeued", reason=str(event.get("reason", "")), lost=fault)
        self._waiting = time

    def _on_lost(self, event: Mapping[str, Any], time: str) -> None:
        text = said(event)
        if self._now is not None:
            end = self._waiting = self._last_sign(self._now, time)
            self._now.marks.append(Mark(kind="fault", time=end, text=text))
            self._close(end, outcome="lost", reason=text, lost=True)
        elif self.tries:  # a look at the scheduler has told before that the try is over
            last = self.tries[-1]
            last.marks.append(Mark(kind="fault", time=last.ended, text=text))
            last.outcome, last.reason = "lost", text
            _lose(last)

    def _on_hang(self, event: Mapping[str, Any], time: str) -> None:
        self._mark("fault", time, said(event))

    def _on_failed(self, event: Mapping[str, Any], time: str) -> None:
        self._mark("fault", time, said(event))
        self._close(time, outcome="failed", reason=str(event.get("reason", "")), lost=True)

    def _on_cancelled(self, event: Mapping[str, Any], time: str) -> None:
        self._close(time, outcome="cancelled", reason=str(event.get("reason") or event.get("by") or ""))

    def _on_finished(self, event: Mapping[str, Any], time: str) -> None:
        if self._now is not None:
            self._now.last_step = max(self._now.last_step, _whole(event.get("step")))
        self._close(time, outcome="finished")

    def _mark(self, kind: str, time: str, text: str, step: object = None) -> None:
        mark = Mark(kind=kind, time=time, text=text, step=_whole(step) if isinstance(step, int) else None)
        (self._pending if self._now is None else self._now.marks).append(mark)

    def _end_stretch(self, time: str) -> None:
        if self._now is None or not self._since < time:
            return
        if not self._ready:  # written by hand, or by a version that did not tell
            trained = (str(line.get("time", "")) for line in self._lines)
            ready = min((each for each in trained if self._since < each < time), default="")
            self._on_loaded({}, ready or time)
        if self._since < time:
            self._now.spans.append(Span(kind="running", start=self._since, end=time))
        self._since = time

    def _close(
        self, time: str, *, outcome: str, reason: str = "", active: bool = False, lost: bool = False
    ) -> None:
        if self._now is None:
            return
        self._end_stretch(time)
        this, self._now = self._now, None
        if lost:
            _lose(this)
        this.ended, this.outcome, this.reason, this.active = max(time, this.started), outcome, reason, active
        steps = [
            _whole(line.get("step"))
            for line in self._lines
            if this.started <= str(line.get("time", "")) <= this.ended
        ]
        this.last_step = max([this.last_step, this.first_step, *steps])
        self.tries.append(this)

    def _last_sign(self, this: Try, before: str) -> str:
        """The last that a try has said: when it was ended is nowhere written."""
        times = [str(line.get("time", "")) for line in self._lines]
        times += [mark.time for mark in this.marks]
        return max([this.started, *(time for time in times if this.started < time < before)])

    def _evaluations(self) -> None:
        for line in self._lines:
            time = str(line.get("time", ""))
            if line.get("eval_loss") is None or not time:
                continue
            this = next((each for each in self.tries if each.started <= time <= each.ended), None)
            if this is not None and this.started:
                text = f"evaluation at step {line.get('step')}: loss {words.number(line['eval_loss'])}"
                this.marks.append(Mark(kind="evaluation", time=time, text=text))


def read(
    events: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], until: str, *, active: bool
) -> list[Try]:
    """The run's tries, the oldest first.

    Args:
        events: of events.jsonl.
        lines: of metrics.jsonl.
        until: when the run ended; now, if it hasn't.
        active: whether it goes on.
    """
    return _Reader(until, active, lines).read(events)


def _lose(this: Try) -> None:
    """What a try did since its last checkpoint is to be done again."""
    span = next((each for each in reversed(this.spans) if each.kind in ("running", "starting")), None)
    if span is None:
        return
    saved = [
        mark.time for mark in this.marks if mark.kind == "checkpoint" and span.start < mark.time <= span.end
    ]
    this.spans.append(Span(kind="lost", start=max([span.start, *saved]), end=span.end))


def said(event: Mapping[str, Any]) -> str:
    """What an event says, in one line."""
    kind = str(event.get("event", ""))
    text = str(event.get("message") or event.get("reason") or "")
    if kind == "straggler" and not text:
        text = straggler([dict(event)])
    more = str(event.get("why") or "") if kind in ("restarting", "requeued") else ""
    name = NOTES.get(kind, kind) if kind not in ("warning", "restarting") else ""
    step = event.get("step")
    where = f"at step {step}" if kind in (*FAULTS, "stopping") and isinstance(step, int) else ""
    return ": ".join(
        part
        for part in (" ".join(filter(None, (name, where))), "; ".join(filter(None, (text, more))))
        if part
    )


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
