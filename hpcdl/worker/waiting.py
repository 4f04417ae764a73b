"""How long this rank waits for others, in a few steps now and then: what tells a slow rank from its victims.

A look takes some steps in a row, the same on all ranks, and costs 1 ms on a CPU: torch's profiler with nothing but
`USER_SCOPE`, where each collective says from when to when it was under way (`gloo:<kind>`) while the operators
between them aren't recorded. What a rank has waited is then the lesser of

    under way   seconds with a collective under way
    blocked     seconds in which its main thread neither ran nor was ready to run (/proc/thread-self/schedstat)

since computation hides collectives, and not all that blocks is a collective: a sleep, a disk, SIGSTOP. On a GPU
the kernels tell both: NCCL's, which last until the last rank has come, less what was computed meanwhile
(`exposed_s` of hpcdl.worker.communication); nothing but kernels is recorded there.

How often: so that the looks' own cost, which is measured, stays below SHARE of the time, and no more than one in
`monitor.every_s` after the first ones. All ranks count with the same numbers, and so look at the same steps.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hpcdl.monitor import stragglers
from hpcdl.monitor.stragglers import Ranks, Suspicion, Times
from hpcdl.runs.files import append_line
from hpcdl.runs.store import RunDir, now
from hpcdl.spec import MonitorSpec
from hpcdl.worker import communication, control
from hpcdl.worker.communication import SAID, Span, overlap, union
from hpcdl.worker.process import Process

if TYPE_CHECKING:
    import torch

SHARE = 0.003
"""Of the time that looking may take."""
LOOK_S = 0.25
"""A look takes steps enough for this: what comes and goes (a duty cycle, a neighbour's bursts) is seen in part."""
MOST_STEPS = 16
"""But no more steps than this."""
LEAST_GAP = 4
"""Steps from the end of a look to the next one, at least."""
TICK_S = 0.005
STILL_S = 0.02
"""A thread that sleeps for TICK_S and wakes so much later has been kept from it."""


class Lookout:
    """Looks at this rank's steps, and on rank 0 says whom all wait for.

    Args:
        run: where ranks.jsonl and events go.
        who: this rank.
        device: where it computes.
        spec: whether anything is measured, and how often at most.
        work: this rank's share of the work by construction.
        lag: steps by which ranks may be apart.
    """

    def __init__(
        self,
        run: RunDir,
        who: Process,
        device: torch.device,
        spec: MonitorSpec,
        *,
        work: float = 1.0,
        lag: int = 0,
    ) -> None:
        self._run, self._who, self._device = run, who, device
        self._active = who.world_size > 1 and spec.name != "none"
        self._every_s = spec.every_s
        self._lag = lag
        self._next: int | None = None
        self._steps = 1
        """Of the next look."""
        self._meter: _Meter | None = None
        self._sent: dict[int, tuple[int, control.Gathering]] = {}
        self._looks: list[list[Times]] = []
        self._windows = 0
        self._window_from = 0
        self._suspicion = Suspicion()
        self._ranks = self._introduce(work) if self._active else None
        self.cost_s = 0.0
        """What all looks have cost this rank so far."""

    def _introduce(self, work: float) -> Ranks:
        everyone = control.words_of_all((self._who.node, work))
        ranks = Ranks(nodes=tuple(node for node, _ in everyone), work=tuple(share for _, share in everyone))
        self._write({"try": self._who.attempt, "restart": self._who.restart, **stragglers.header(ranks)})
        return ranks

    def start(self, first: int) -> None:
        """Steps from `first` on may be looked at; those before are measured otherwise."""
        if self._active:
            self._next = first + LEAST_GAP

    # --- a step --------------------------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """A step begins; right before it is timed."""
        if self._meter is None and step != self._next:
            return
        if self._meter is None:
            self._meter = _Meter(self._device)
        self._meter.begin()

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Put around the reading of a step's batches."""
        meter = self._meter
        if meter is None:
            yield
            return
        started, before = time.perf_counter(), _scheduled()
        yield
        took = time.perf_counter() - started
        meter.data_s += took
        meter.asleep_s += took - sum(_scheduled()) + sum(before)

    def end(self, step: int) -> None:
        """A step is over; the last one of a look sends what was seen."""
        meter = self._meter
        if meter is None:
            return
        meter.end()
        if len(meter.windows) < self._steps:
            return
        self._meter = None
        numbers = meter.numbers()
        self.cost_s += meter.cost_s
        self._sent[step] = len(meter.windows), control.Gathering(numbers, self._device)

    def reached(self, step: int) -> None:
        """Every rank has done `step` by now: takes in what they saw, if a look ended with it."""
        if step not in self._sent:
            return
        steps, gathering = self._sent.pop(step)
        everyone = gathering.wait().tolist()
        looks = [
            Times(step_s=step_s, wait_s=wait_s, data_s=data_s, cpu_s=cpu_s, delay_s=delay_s, still_s=still_s)
            for step_s, wait_s, data_s, cpu_s, delay_s, still_s, *_ in everyone
        ]
        if any(math.isnan(times.wait_s) for times in looks):
            return  # a rank can't look, and has said why: nobody looks again
        self._window_from = self._window_from or step - steps + 1
        self._looks.append(looks)
        if len(self._looks) == stragglers.LOOKS:
            self._judge(step)
        self._plan(step, everyone)

    def close(self) -> None:
        """Ends a look that the run's end has interrupted."""
        meter, self._meter = self._meter, None
        if meter is not None:
            meter.numbers()

    # --- what follows --------------------------------------------------------------------------------------

    def _plan(self, step: int, everyone: Sequence[Sequence[float]]) -> None:
        """When to look again, from numbers that all ranks have."""
        step_s = max(1e-6, sorted(row[0] for row in everyone)[len(everyone) // 2])
        cost_s = sorted(row[6] for row in everyone)[len(everyone) // 2]
        self._steps = min(MOST_STEPS, max(1, math.ceil(LOOK_S / step_s)))
        gap = max(LEAST_GAP, self._steps, math.ceil(cost_s / (SHARE * step_s)))
        if self._windows >= 2:
            gap = max(gap, math.ceil(self._every_s / step_s))
        self._next = step + self._lag + gap

    def _judge(self, step: int) -> None:
        assert self._ranks is not None
        looks, first = self._looks, self._window_from
        self._looks, self._window_from, self._windows = [], 0, self._windows + 1
        if not self._who.is_first:
            return
        self._write(stragglers.line(step, stragglers.median(looks)))
        news = self._suspicion.hear(stragglers.judge(looks, self._ranks), first)
        if news is None:
            return
        kind, verdict, since = news
        self._run.event(kind, **stragglers.as_event(verdict, since), **{"try": self._who.attempt})
        print(f"{kind.replace('_', ' ')} at step {step}: {verdict.words}", flush=True)

    def _write(self, record: dict[str, Any]) -> None:
        if self._who.is_first:
            append_line(self._run.path / "ranks.jsonl", {"time": now(), **record})


class _Meter:
    """One look: the profiler is on from its making to `numbers`."""

    def __init__(self, device: torch.device) -> None:
        started = time.perf_counter()
        self._gpu = device.type == "cuda"
        self._device = device
        self._refused = ""
        try:
            self._start()
        except RuntimeError as error:  # no CUPTI, somebody else's profiler: no reason to end a training
            self._refused = str(error).strip().splitlines()[0]
        self.windows: list[Span] = []
        """Begin and end of each step, in ns since the epoch."""
        self.data_s = 0.0
        self.asleep_s = 0.0
        """Of data_s: neither running nor ready to."""
        self._seconds = 0.0
        self._ran, self._delayed = 0.0, 0.0
        self._begun: tuple[float, int, float, float] = (0.0, 0, 0.0, 0.0)
        self._ticker = _Ticker()
        self.cost_s = time.perf_counter() - started

    def _start(self) -> None:
        import torch
        from torch._C import _autograd
        from torch._C._profiler import (
            ProfilerActivity,
            ProfilerConfig,
            ProfilerState,
            RecordScope,
            _ExperimentalConfig,
        )

        # Kineto writes a line to stderr at each start and stop otherwise; read at its first start.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self._torch = torch
        activities = {ProfilerActivity.CUDA} if self._gpu else {ProfilerActivity.CPU}
        nothing_more = (False, False, False, False, False)  # shapes, memory, stacks, FLOPs, modules
        config = ProfilerConfig(ProfilerState.KINETO, *nothing_more, _ExperimentalConfig())
        # torch.profiler.profile has no argument for scopes: it records every operator, at 15 µs each.
        profiler: Any = _autograd
        profiler._prepare_profiler(config, activities)
        profiler._enable_profiler(config, activities, {RecordScope.USER_SCOPE})

    def begin(self) -> None:
        """A step begins."""
        self._begun = (time.perf_counter(), time.time_ns(), *_scheduled())

    def end(self) -> None:
        """A step is over."""
        if self._gpu:
            self._torch.cuda.synchronize(self._device)
        started, at, ran, delayed = self._begun
        self._seconds += time.perf_counter() - started
        self.windows.append((at, time.time_ns()))
        now_ran, now_delayed = _scheduled()
        self._ran += now_ran - ran
        self._delayed += now_delayed - delayed

    def numbers(self) -> list[float]:
        """Seconds a step in the order of Times' fields, what looking has cost, and its steps; ends the look."""
        started = time.perf_counter()
        still_s = self._ticker.stop(self.windows)
        steps = max(1, len(self.windows))
        if self._refused:
            print(f"who waits for whom can't be told: torch's profiler: {self._refused}", flush=True)
            return [self._seconds / steps, math.nan, 0.0, 0.0, 0.0, 0.0, time.perf_counter() - started]
        from torch._C._autograd import _disable_profiler

        control.settle()
        events = _disable_profiler().events()
        waited = exposed(events) if self._gpu else under_way(events)
        wait_s = overlap(union(waited), union(self.windows)) / 1e9
        if not self._gpu:
            blocked = self._seconds - self._ran - self._delayed - self.asleep_s
            wait_s = max(0.0, min(wait_s, blocked))
        sums = (self._seconds, wait_s, self.data_s, self._ran, self._delayed, still_s)
        self.cost_s += time.perf_counter() - started
        return [*(value / steps for value in sums), self.cost_s]


def under_way(events: Any) -> list[Span]:
    """When something was sent or waited for, on a CPU."""
    found = []
    for event in events:
        name = event.name()
        if name.startswith(("gloo:", SAID)) or name == control.WAITS:
            found.append((event.start_ns(), event.end_ns()))
    return found


def exposed(events: Any) -> list[Span]:
    """When NCCL's kernels ran and no other did."""
    kernels = list(communication.kernels(events))
    talking = union(span for name, span in kernels if name.startswith("nccl"))
    return less(talking, union(span for name, span in kernels if not name.startswith("nccl")))


def less(one: Sequence[Span], two: Sequence[Span]) -> list[Span]:
    """What of merged spans no other merged ones cover."""
    found: list[Span] = []
    at = 0
    for begin, end in one:
        while at < len(two) and two[at][1] <= begin:
            at += 1
        left, next_ = begin, at
        while next_ < len(two) and two[next_][0] < end:
            if two[next_][0] > left:
                found.append((left, two[next_][0]))
            left = max(left, two[next_][1])
            next_ += 1
        if left < end:
            found.append((left, end))
    return found


def _scheduled() -> tuple[float, float]:
    """Seconds in which this thread ran, and in which it was ready to and somebody else did.

    The second is 0 where the kernel doesn't say (CONFIG_SCHED_INFO).
    """
    try:
        with open("/proc/thread-self/schedstat", "rb", buffering=0) as file:  # noqa: PTH123 quick
            ran, delayed, _ = file.read().split()
        return int(ran) / 1e9, int(delayed) / 1e9
    except (OSError, ValueError):
        return time.thread_time(), 0.0


class _Ticker:
    """A thread that notices when this process stands still: it can't wake either."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._gaps: list[Span] = []
        self._thread = threading.Thread(target=self._tick, name="lookout", daemon=True)
        self._thread.start()

    def _tick(self) -> None:
        before, over = time.time_ns(), False
        while not over:
            over = self._over.wait(TICK_S)
            at = time.time_ns()
            if at - before > STILL_S * 1e9:
                self._gaps.append((before, at))
            before = at

    def stop(self, windows: Sequence[Span]) -> float:
        """Seconds of these windows in which it stood still."""
        self._over.set()
        self._thread.join()
        return overlap(union(self._gaps), union(windows)) / 1e9
