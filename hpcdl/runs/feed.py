"""What a run writes while it goes on, as progress and as lines worth printing."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from hpcdl.runs import words
from hpcdl.runs.state import RunState
from hpcdl.runs.store import RunDir
from hpcdl.runs.tail import Tail

RECENT_STEPS = 20
"""Steps whose times make the estimate of what is left."""


@dataclass(slots=True)
class Progress:
    """Where a run stands."""

    step: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    memory_bytes: int | None = None
    """What rank 0 has held at most."""
    first_perplexity: float | None = None
    last_perplexity: float | None = None
    last_eval_step: int = 0
    step_times: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    """Seconds of the last steps."""

    def take(self, record: dict[str, Any]) -> bool:
        """A line of metrics.jsonl; whether it is a step's."""
        step = record.get("step")
        if not isinstance(step, int) or "loss" not in record:
            return False
        self.step = step
        self.loss = _float(record.get("loss"))
        self.tokens_per_s = _float(record.get("tokens_per_s"))
        peak = _float(record.get("peak_memory_bytes"))
        self.memory_bytes = int(peak) if peak and math.isfinite(peak) else self.memory_bytes
        seconds = _float(record.get("step_s"))
        if seconds is not None:
            self.step_times.append(seconds)
        return True

    def left_s(self, max_steps: int) -> float | None:
        """Seconds that the remaining steps will take, by the median of the last ones."""
        if not self.step_times:
            return None
        return statistics.median(self.step_times) * max(0, max_steps - self.step)

    def line(self, max_steps: int) -> str:
        """`step 40/100  loss 3.1200  1,234 tokens/s  1.2 GiB  0:58 left`."""
        parts = [f"step {self.step}/{max_steps}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.tokens_per_s:
            parts.append(f"{self.tokens_per_s:,.0f} tokens/s")
        if self.memory_bytes:
            parts.append(words.size(self.memory_bytes))
        left = self.left_s(max_steps)
        if left:
            parts.append(f"{words.duration(left)} left")
        return "  ".join(parts)


class Feed:
    """Reads a run's metrics and events as they are appended.

    What earlier launches of the run did is no news, nor what they measured.

    Args:
        run: the run.
        attempt: which launch of the run this is.
    """

    def __init__(self, run: RunDir, attempt: int = 0) -> None:
        self.progress = Progress()
        self.stepped = False
        """Whether the last `read` met a new step."""
        self._metrics = Tail(run.metrics_file)
        self._events = Tail(run.events_file)
        self._told: set[tuple[int, float]] = set()
        """Evaluations that were told; the lines come again when the file is replaced on resuming."""
        past = self._events.records()
        launches = [i for i, event in enumerate(past) if event.get("event") == "submitted"]
        self._first = past[launches[-1] :] if launches else past
        if attempt:
            for record in self._metrics.records():
                self._take(record)

    def read(self) -> list[str]:
        """What is new and worth a line."""
        events = [*self._first, *self._events.records()]
        self._first = []
        news = [text for text in map(_event_line, events) if text]
        self.stepped = False
        for record in self._metrics.records():
            news += self._take(record)
        return news

    def _take(self, record: dict[str, Any]) -> list[str]:
        step = record.get("step")
        if not isinstance(step, int):
            return []
        progress = self.progress
        perplexity = record.get("eval_perplexity")
        if isinstance(perplexity, int | float):
            progress.last_perplexity, progress.last_eval_step = float(perplexity), step
            if progress.first_perplexity is None or step == 0:
                progress.first_perplexity = float(perplexity)
            return self._once(step, float(perplexity), f"held-out perplexity {perplexity:.3f} at step {step}")
        for what in ("return", "reward"):
            value = record.get(f"eval_{what}")
            if isinstance(value, int | float):
                return self._once(step, float(value), f"held-out {what} {value:.4g} at step {step}")
        self.stepped = progress.take(record) or self.stepped
        return []

    def _once(self, step: int, value: float, text: str) -> list[str]:
        """An evaluation's line, where it wasn't told yet."""
        told = (step, value) in self._told
        self._told.add((step, value))
        return [] if told else [text]


def _float(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:  # somebody else may have written it
        return None


def _event_line(event: dict[str, Any]) -> str:
    """An event in words; empty for those that the view shows otherwise (submitted, the end)."""
    kind = event.get("event")
    if kind == "started":
        nodes = event.get("node_list") or []
        where = f" on {', '.join(map(str, nodes))}" if nodes else ""
        job = f", job {event['job_id']}" if event.get("job_id") else ""
        return f"started{where}{job} (try {event.get('try', '0.0')})"
    if kind == "resumed":
        return f"resumed from step {event.get('step')}"
    if kind == "checkpoint":
        return f"checkpoint at step {event.get('step')}"
    if kind == "checkpoint_failed" or (kind == "warning" and event.get("checkpoint")):
        return str(event.get("message"))
    if kind == "restarting":
        return f"{event.get('reason')}; {event.get('why')}"
    if kind in ("lost", "hang", "leak"):
        return str(event.get("message"))
    if kind == "restarted":
        return f"restarted in place, for the {event.get('restart')}. time"
    if kind == "stopping":
        return f"stopping at step {event.get('step')}: {event.get('reason')}"
    if kind == "requeued":
        if event.get("way") == "successor":
            return f"job {event.get('job_id')} goes on: {event.get('reason')}"
        return f"put back into the queue: {event.get('reason')}"
    if kind == "hastened":
        return "requeued job asked to start now instead of in two minutes"
    return ""


def end_line(state: RunState) -> str:
    """How it ended: `COMPLETED after 1:23`, `FAILED after 0:12: ValueError: …`."""
    took = f" after {words.duration(words.between(state.started, state.ended))}" if state.started else ""
    return f"{state.state}{took}{': ' + state.reason if state.reason else ''}"
