"""The foreground view of a run: a live block of lines on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from hpcdl.runs import processes, terminal, words
from hpcdl.runs.feed import Feed, Progress
from hpcdl.runs.reconcile import View

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live

PLAIN_EVERY_S = 5.0
PLAIN_EVERY_STEPS = 10
MEMORY_EVERY_S = 2.0


class Display(Protocol):
    """What `follow` shows things on."""

    def __enter__(self) -> Display: ...

    def __exit__(self, *_: object) -> None: ...

    def news(self, line: str) -> None:
        """Something happened."""

    def say(self, line: str) -> None:
        """A remark to the user."""

    def update(self, view: View, feed: Feed) -> None:
        """How a run stands now."""

    def update_all(self, views: Sequence[View]) -> None:
        """How the runs of a sweep stand now."""

    def close(self) -> None:
        """Leaves the live block as it is; lines may follow."""

    def mute(self) -> None:
        """The terminal is gone: nothing is written any more."""

    def end(self, view: View, line: str) -> None:
        """The run is over."""


def for_console(console: Console | None) -> Display:
    """The view that fits where the output goes."""
    console = console or terminal.console(highlight=False)
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


class _Base:
    """What both views share: lines, and the end."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.muted = False

    def say(self, line: str) -> None:
        if not self.muted:
            self.console.print(line, markup=False, soft_wrap=True)

    def mute(self) -> None:
        self.muted = True

    def close(self) -> None:
        """Nothing to leave."""

    def end(self, view: View, line: str) -> None:
        if self.muted:
            return
        self.close()
        from rich.text import Text

        state = view.state
        self.console.print(Text(line, style=words.STYLES[state.state]), soft_wrap=True)
        if state.state == "COMPLETED":
            _print_result(self.console, view)
        elif state.state != "CANCELLED":
            _print_failure(self.console, view)


class PlainDisplay(_Base):
    """Lines for a file or a pipe: the start, some steps, evaluations, checkpoints, the end."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._waiting = ""
        self._last_time = float("-inf")
        self._last_step = 0

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def news(self, line: str) -> None:
        """A line."""
        self.say(line)

    def update(self, view: View, feed: Feed) -> None:
        """Some of the steps, and each new reason to wait."""
        state = view.state
        if state.state in ("PENDING", "UNKNOWN"):
            remark = f"{state.state}{': ' + state.reason if state.reason else ''}"
            if remark != self._waiting:
                self.say(remark)
            self._waiting = remark
            return
        self._waiting = ""
        step = feed.progress.step
        late = time.monotonic() - self._last_time >= PLAIN_EVERY_S
        many = step // PLAIN_EVERY_STEPS > self._last_step // PLAIN_EVERY_STEPS
        if step != self._last_step and (late or many or step >= state.max_steps):
            self.say(feed.progress.line(state.max_steps))
            self._last_time, self._last_step = time.monotonic(), step

    def update_all(self, views: Sequence[View]) -> None:
        """Changes were told as news."""


class LiveDisplay(_Base):
    """A block of lines that is drawn anew, news scrolling by above it."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._live: Live | None = None
        self._memory: tuple[float, int | None] = (float("-inf"), None)

    def __enter__(self) -> LiveDisplay:
        from rich.live import Live

        self._live = Live(console=self.console, refresh_per_second=4, transient=True)
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes the live block off the screen."""
        if self._live is not None and not self.muted:
            self._live.stop()
        self._live = None

    def mute(self) -> None:
        """Stops drawing."""
        if not self.muted and self._live is not None:
            # The refresh thread must not write to a terminal that is gone.
            self._live.auto_refresh = False
            self.console.quiet = True
        self.muted = True

    def news(self, line: str) -> None:
        """A line."""
        if not self.muted:
            self.console.print(line, style="dim", markup=False, soft_wrap=True)

    def update(self, view: View, feed: Feed) -> None:
        """Some of the steps, and each new reason to wait."""
        if self._live is not None and not self.muted:
            self._live.update(block(view, feed.progress, self._memory_of(view, feed.progress)))

    def update_all(self, views: Sequence[View]) -> None:
        """How many runs are in which state."""
        from rich.text import Text

        from hpcdl.runs.status import summary

        if self._live is not None and not self.muted:
            self._live.update(Text(summary(views)))

    def _memory_of(self, view: View, progress: Progress) -> int | None:
        """What a local run's processes hold now; elsewhere rank 0's peak, which it logs."""
        if view.state.kind != "local":
            return progress.memory_bytes
        measured, memory = self._memory
        if time.monotonic() - measured >= MEMORY_EVERY_S:
            memory = processes.resident_bytes(view.state)
            self._memory = (time.monotonic(), memory)
        return memory or progress.memory_bytes


def block(view: View, progress: Progress, memory_bytes: int | None) -> Group:
    """The lines that are drawn anew: what runs, how far it is, what it measures."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    state = view.state
    title = Text.assemble((state.name, "bold"), "  ", (state.run_id, "dim"), "  ")
    title.append(state.state, style=words.STYLES[state.state])
    if state.started and state.state == "RUNNING":
        title.append(f"  {words.duration(words.since(state.started))}")
    lines: list[Text | Table] = [title]
    if state.state in ("PENDING", "UNKNOWN"):
        lines.append(Text(state.reason or "starting", style="yellow"))
        return Group(*lines)
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(ratio=1)
    bar.add_column(justify="right", no_wrap=True)
    count = f"step {progress.step}/{state.max_steps}"
    bar.add_row(ProgressBar(total=max(1, state.max_steps), completed=progress.step), count)
    lines.append(bar)
    lines.append(Text("   ".join(_measures(progress, memory_bytes, state.max_steps))))
    if progress.first_perplexity is not None and progress.last_perplexity is not None:
        text = f"held-out perplexity {progress.first_perplexity:.3f}"
        if progress.last_eval_step > 0:
            text += f" → {progress.last_perplexity:.3f} (step {progress.last_eval_step})"
        lines.append(Text(text, style="dim"))
    return Group(*lines)


def _measures(progress: Progress, memory_bytes: int | None, max_steps: int) -> list[str]:
    measures = [f"loss {progress.loss:.4f}" if progress.loss is not None else "the workers are starting …"]
    if progress.tokens_per_s:
        measures.append(f"{progress.tokens_per_s:,.0f} tokens/s")
    if memory_bytes:
        measures.append(words.size(memory_bytes))
    left = progress.left_s(max_steps)
    if left:
        measures.append(f"{words.duration(left)} left")
    return measures


def _print_result(console: Console, view: View) -> None:
    from hpcdl.runs.result import load, print_result

    if view.run.result_file.exists():
        print_result(console, view, load(view))


def _print_failure(console: Console, view: View) -> None:
    from hpcdl.runs.status import traceback_of

    traceback = traceback_of(view.run, view.state)
    if traceback:
        console.print(traceback.rstrip(), markup=False, soft_wrap=True)
    console.print(
        f"hpcdl logs {view.state.run_id} shows what every rank printed.", markup=False, soft_wrap=True
    )
