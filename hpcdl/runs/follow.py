"""Watching a run to its end: `hpcdl launch` of a local run, `wait=true`, `hpcdl follow`."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from hpcdl.runs import patience, processes
from hpcdl.runs.display import Display, for_console
from hpcdl.runs.feed import Feed, end_line
from hpcdl.runs.hurry import hurry
from hpcdl.runs.reconcile import View, read, reconcile
from hpcdl.runs.scheduler import Slurm
from hpcdl.runs.state import ACTIVE, RunState
from hpcdl.runs.store import RunDir, now

if TYPE_CHECKING:
    from rich.console import Console

TICK_S = 0.25
LOCAL_EVERY_S = 1.0
SLURM_FIRST_S = 3.0
SLURM_MOST_S = 30.0
SLURM_GROWTH = 1.3
KILL_AFTER_S = 10.0
"""How long an agent that was asked twice may take."""

OnInterrupt = Literal["stop", "leave"]


def exit_code(state: RunState) -> int:
    """The launcher's exit code for a run that it has followed: 0 done, 130 interrupted, 1 anything else."""
    if state.state == "COMPLETED":
        return 0
    return 130 if state.state == "CANCELLED" and state.exit_code == 130 else 1


def follow(
    run: RunDir,
    *,
    on_interrupt: OnInterrupt | None = None,
    console: Console | None = None,
    slurm: Slurm | None = None,
) -> RunState:
    """Shows a run's progress until it is over; ends with its result, or with what went wrong.

    Args:
        run: the run.
        on_interrupt: what Ctrl-C does: `stop` asks a local run's agent to save a checkpoint and end (a
            second one kills it), `leave` lets the run go on. By default `stop` for a local run only.
        console: where to; by default this process's output.
        slurm: whom to ask.

    Returns:
        The final state.

    Raises:
        KeyboardInterrupt: Ctrl-C, and the run was left as it is.
    """
    display = for_console(console)
    watcher = Watcher([run], slurm or Slurm())
    view = watcher.views[0]
    stop = (on_interrupt or ("stop" if view.state.kind == "local" else "leave")) == "stop"
    feed = Feed(run, view.state.attempt)
    with Interrupts(catch_hangup=stop) as interrupts, display:
        stopper = Stopper(run, display)
        while True:
            view = watcher.look()[0]
            over = view.state.state not in ACTIVE
            for line in feed.read():
                display.news(line)
            if remark := watcher.take_remark():
                display.news(remark)
            display.update(view, feed)
            if over:
                break
            if interrupts.hung_up:
                display.mute()
            if interrupts.count and not stop:
                display.close()
                display.say(
                    f"{view.state.run_id} goes on. hpcdl follow {view.state.run_id} looks at it again, "
                )
                display.say(f"hpcdl cancel {view.state.run_id} ends it.")
                raise KeyboardInterrupt
            stopper.act(interrupts.count, view.state)
            time.sleep(TICK_S)
    display.end(view, end_line(view.state))
    return view.state


def follow_all(
    runs: Sequence[RunDir], *, console: Console | None = None, slurm: Slurm | None = None
) -> list[RunState]:
    """Follows the runs of a sweep until all are over: a line for each that changes.

    Raises:
        KeyboardInterrupt: Ctrl-C; the runs go on.
    """
    if len(runs) == 1:
        return [follow(runs[0], console=console, slurm=slurm)]
    display = for_console(console)
    watcher = Watcher(runs, slurm or Slurm())
    shown: dict[RunDir, str] = {}
    with display:
        while True:
            views = watcher.look()
            for view in views:
                if view.state.state != shown.get(view.run):
                    why = f": {view.state.reason}" if view.state.reason else ""
                    display.news(f"{view.state.run_id} {view.state.state}{why}")
                shown[view.run] = view.state.state
            if remark := watcher.take_remark():
                display.news(remark)
            display.update_all(views)
            if all(view.state.state not in ACTIVE for view in views):
                break
            time.sleep(TICK_S)
    return [view.state for view in views]


class Watcher:
    """Reads state.json often, and asks the scheduler now and then, less often while nothing changes."""

    def __init__(self, runs: Sequence[RunDir], slurm: Slurm) -> None:
        self._runs = runs
        self._slurm = slurm
        self._local = all(run.read_state().kind == "local" for run in runs)
        self._every_s = LOCAL_EVERY_S if self._local else SLURM_FIRST_S
        self._asked = float("-inf")
        self._failures = 0
        self.remark = ""
        """Of a Slurm that doesn't answer, and when it is asked again; to be said once."""
        self._judged: dict[RunDir, RunState] = {}
        """What each file said when its view was made: the view holds until the file says something else."""
        self.views = read(runs).views

    def look(self) -> list[View]:
        """The runs as they stand now."""
        fresh = read(self._runs).views
        changed = any(self._judged.get(view.run) != view.state for view in fresh)
        due = time.monotonic() - self._asked >= self._every_s
        if due:
            self._asked = time.monotonic()
            before = [view.state.state for view in self.views]
            self.views = hurry(reconcile(fresh, self._slurm), self._slurm)
            self._judged = {view.run: view.state for view in fresh}
            if not self._local:
                same = before == [view.state.state for view in self.views]
                self._every_s = min(SLURM_MOST_S, self._every_s * SLURM_GROWTH) if same else SLURM_FIRST_S
                self._back_off(next((view.unchecked for view in self.views if view.since), ""))
        elif changed:
            self._judged = {view.run: view.state for view in fresh}
            self.views = fresh
            # A file that changes is news from the agent; what the scheduler makes of it is asked soon.
            self._every_s = LOCAL_EVERY_S if self._local else SLURM_FIRST_S
        return self.views

    def take_remark(self) -> str:
        """The remark, unless it was taken before."""
        remark, self.remark = self.remark, ""
        return remark

    def _back_off(self, away: str) -> None:
        if not away:
            if self._failures:
                self.remark = "Slurm answers again"
            self._failures = 0
            return
        self._failures += 1
        self._every_s = patience.delay_s(self._failures)
        self.remark = patience.words(away, self._every_s)


class Interrupts:
    """Counts Ctrl-C instead of raising, as long as it is entered; in the main thread only.

    Args:
        catch_hangup: count SIGTERM and SIGHUP (the terminal was closed) as well.
    """

    def __init__(self, *, catch_hangup: bool) -> None:
        self.count = 0
        self.hung_up = False
        self._signals = [signal.SIGINT, *([signal.SIGTERM, signal.SIGHUP] if catch_hangup else [])]
        self._before: dict[int, Any] = {}

    def _take(self, number: int, _frame: FrameType | None) -> None:
        # A closed terminal sends SIGHUP more than once: only Ctrl-C may grow into the second, hard one.
        self.count = self.count + 1 if number == signal.SIGINT else max(1, self.count)
        self.hung_up = self.hung_up or number == signal.SIGHUP

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Stopper:
    """Stops a local run: gently on the first Ctrl-C, hard on the second, with our own hands if need be."""

    def __init__(self, run: RunDir, display: Display) -> None:
        self._run = run
        self._display = display
        self._said = 0
        self._sent = 0
        self._hard_since = float("inf")

    def act(self, count: int, state: RunState) -> None:
        """Does what so many interrupts ask for, once each."""
        if count == 0:
            return
        if self._said == 0:
            self._display.say("Stopping: a checkpoint is being saved. Ctrl-C again kills the run at once.")
        elif self._said == 1 and count > 1:
            self._display.say("Killing the run.")
        self._said = min(count, 2)
        if self._sent < self._said and processes.signal_agent(state, signal.SIGINT):
            # An agent that has not come up yet is asked as soon as it has.
            self._sent += 1
            self._hard_since = time.monotonic() if self._sent == 2 else self._hard_since
        unborn = processes.agent_life(state) == "unborn"
        if count > 2 or (count > 1 and unborn) or time.monotonic() - self._hard_since > KILL_AFTER_S:
            kill(self._run, state)


def kill(run: RunDir, state: RunState) -> None:
    """Ends a local run at once, without a checkpoint, and says so in its state.

    Raises:
        KeyboardInterrupt: its agent has not come up yet; the workers will find a STOP file.
    """
    if processes.agent_life(state) == "unborn":
        run.stop_file.write_text("cancel\n", encoding="utf-8")
        raise KeyboardInterrupt
    processes.kill_tree(state)
    reason = "killed by its user; the last checkpoint stands"
    current = run.read_state()
    if current.state in ACTIVE:
        run.update(
            expect=current,
            event=("cancelled", {"by": "Ctrl-C"}),
            state="CANCELLED",
            reason=reason,
            exit_code=130,
            ended=now(),
        )
