"""The terminal: one thread reads files, one asks Slurm, this one draws and takes keys."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from rich.text import Text
from textual.app import App
from textual.binding import Binding, BindingType

from hpcdl.errors import HpcdlError
from hpcdl.monitor import stragglers
from hpcdl.runs import cancel, words
from hpcdl.runs.state import ACTIVE
from hpcdl.runs.store import RunDir
from hpcdl.top.details import Details
from hpcdl.top.reading import Row
from hpcdl.top.rows import plain
from hpcdl.top.screens import Part, RunScreen, RunsScreen
from hpcdl.top.watch import ASK_EVERY_S, Picture, Watch
from hpcdl.top.widgets import Page, Question

REFRESH_S = 2.0
"""Between two looks at the files."""
OPEN_REFRESH_S = 1.0
"""The same while one run is open."""
MOST_OF_THE_TIME = 0.2
"""Share of the time that looks may take: on a slow disk they are less frequent."""
MESSAGE_S = 8.0
"""How long a message stands in the place of the keys."""
CANCEL_POLL_S = {"local": 1.0, "slurm": ASK_EVERY_S}
"""Between two looks whether a cancelled run has ended."""

HELP = (
    ("↑ ↓  k j", "move; PgUp PgDn Home End as well; ← → along long lines"),
    ("Enter", "open a run; there: ranks, logs and events in turn"),
    ("Esc  q", "back; on the first screen quit, as Ctrl-C does anywhere"),
    ("/", "filter by name, id, state, reason, job, node, warning"),
    ("s  S", "sort by the next, the last column"),
    ("c", "cancel the run: asks; it saves a checkpoint and ends"),
    ("n  l  e", "its ranks and nodes; its logs, followed at their end; events"),
    ("r", f"read the files now; Slurm is asked every {ASK_EVERY_S:.0f} s at most"),
    ("Ctrl-Z", "leave the terminal for a while; fg comes back"),
)
MARKS = (
    ("!", "a warning: a leak, a slow rank, a hang, a failed checkpoint"),
    ("left", "for the remaining steps; dim: what an ended run took"),
    ("mem", "of the fullest node; red: 90 % of its limit is in use"),
    ("cpu  gpu", "100% is one core, all nodes summed; mean over all GPUs"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What was read of the run that is open."""

    log: tuple[str, ...] = ()
    lines_read: int = 0
    events: tuple[str, ...] = ()
    times: tuple[stragglers.Row, ...] = ()
    note: str = ""


class TopApp(App[None]):
    """`hpcdl top`.

    Args:
        watch: what is looked at.
        every_s: between two looks at the files.
    """

    ENABLE_COMMAND_PALETTE = False
    TITLE = "hpcdl top"
    CSS = """
    Screen { layout: vertical; }
    #head, #columns, #tabs, #keys { height: 1; text-wrap: nowrap; text-overflow: ellipsis; }
    #columns { text-style: bold underline; }
    Lines { height: 1fr; scrollbar-size-vertical: 1; scrollbar-size-horizontal: 0; overflow-x: hidden; }
    #pane { border-top: solid ansi_bright_black; text-wrap: nowrap; text-overflow: ellipsis; }
    #about { height: auto; }
    #filter { display: none; height: 1; }
    ModalScreen { align: center middle; }
    .box { width: auto; max-width: 78; height: auto; max-height: 90%; border: round ansi_cyan; padding: 1 2; }
    .box Static { width: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "refresh_now"),
        Binding("question_mark", "help"),
        Binding("ctrl+c,ctrl+q", "leave", priority=True),
        Binding("ctrl+z", "suspend_process"),
    ]

    def __init__(self, watch: Watch, every_s: float = REFRESH_S) -> None:
        super().__init__(ansi_color=True)  # the terminal's own colours, dark or light
        self.theme = "ansi-dark"
        self.animation_level = "none"  # each frame of it would go through ssh
        self.source = watch
        self.picture = Picture()
        self.looked = False
        """Whether the picture is one of the runs."""
        self.news = News()
        self._every_s = every_s
        self._details: Details | None = None
        self._wake = threading.Event()
        self._over = threading.Event()
        self._message, self._said = "", float("-inf")
        self._cancelling: set[RunDir] = set()
        self._asked_to_leave = False

    # --- screens ---

    def on_mount(self) -> None:
        """Shows the first screen, and begins to look."""
        self.push_screen(RunsScreen())
        self.set_interval(1.0, self._show)
        for work in (self._read_files, self._ask_slurm):
            # Daemons: a Slurm or a disk that doesn't answer must not keep the terminal.
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def on_unmount(self) -> None:
        """Ends the looking."""
        self._over.set()
        self._wake.set()

    def _show(self) -> None:
        for screen in self.screen_stack:
            if isinstance(screen, RunsScreen | RunScreen) and screen.is_current:
                screen.show()

    def open_run(self, run: RunDir, part: Part) -> None:
        """Shows one run."""
        self.news, self._details = News(), Details(run)
        self.push_screen(RunScreen(run, part))
        self._wake.set()

    def close_run(self) -> None:
        """Back to all of them."""
        self._details = None
        self.pop_screen()

    def is_cancelling(self, run: RunDir) -> bool:
        """Whether a run was asked to end from here, and hasn't yet."""
        return run in self._cancelling

    def say(self, text: str) -> None:
        """Shows a message for some seconds."""
        self._message, self._said = text, time.monotonic()
        self._show()

    def message(self) -> str:
        """The message that is still fresh."""
        return self._message if time.monotonic() - self._said < MESSAGE_S else ""

    # --- the threads ---

    def _hand_over(self, do: Callable[[], None]) -> None:
        """Has this thread's finding drawn."""
        if self._over.is_set():
            return
        try:
            self.call_from_thread(
                self.call_later, do
            )  # later: what it raises is the app's, not this thread's
        except RuntimeError:  # the app has just ended
            self._over.set()

    def _read_files(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            try:
                picture = self.source.refresh()
            except (HpcdlError, OSError) as error:
                picture = Picture(faults=(str(error),))
            news, details = None, self._details
            if details is not None:
                news = _read_details(details, picture, self.news)

            def take(
                picture: Picture = picture, news: News | None = news, of: Details | None = details
            ) -> None:
                self._take(picture, news if of is self._details else None)

            self._hand_over(take)
            took = time.monotonic() - began
            every = min(self._every_s, OPEN_REFRESH_S) if details is not None else self._every_s
            self._wake.wait(0.01 if picture.unread else max(every, took / MOST_OF_THE_TIME))
            self._wake.clear()

    def _take(self, picture: Picture, news: News | None) -> None:
        first, self.looked, self.picture = not self.looked, True, picture
        if news is not None:
            self.news = news
        self._show()
        if first and len(self.source.wanted.queries) == 1 and len(picture.rows) == 1:
            self.open_run(picture.rows[0].view.run, "ranks")  # `hpcdl top RUN` means this one

    def _ask_slurm(self) -> None:
        while not self._over.is_set():
            if self.source.ask():
                self._wake.set()
            self._over.wait(0.5)

    # --- keys ---

    def action_refresh_now(self) -> None:
        """Reads all files now."""
        self._wake.set()
        news = self.picture.slurm
        if news.needed and news.asked_ago_s is not None:
            self.say(
                f"files are read anew; Slurm was asked {words.age(news.asked_ago_s)} ago, again in "
                f"{words.age(news.next_in_s)}"
            )
        else:
            self.say("files are read anew")

    def action_help(self) -> None:
        """What the keys and columns are."""
        text = Text()
        for key, what in HELP:
            text.append(f"{key:<9}", style="bold").append(f" {what}\n")
        text.append("\n")
        for key, what in MARKS:
            text.append(f"{key:<9}", style="cyan").append(f" {what}\n")
        self.push_screen(Page(text))

    def action_leave(self) -> None:
        """Quits; asks for a second key while runs are being cancelled."""
        if self._cancelling and not self._asked_to_leave:
            self._asked_to_leave = True
            count = len(self._cancelling)
            self.say(
                f"{count} run{'s' if count > 1 else ''} still being cancelled; q again quits all the same"
            )
            return
        self.exit()

    def ask_to_cancel(self, row: Row) -> None:
        """Asks whether a run shall end, and ends it in a thread of its own."""
        run, state = row.view.run, row.state
        if state.state not in ACTIVE:
            self.say(f"{state.run_id} is over: {state.state}")
            return
        if run in self._cancelling:
            self.say(f"{state.run_id} is being cancelled already")
            return
        what = "It leaves the queue." if state.state == "PENDING" else "It saves a checkpoint and ends."
        text = Text.assemble(
            "Cancel ", plain(state.name, "bold"), "  ", plain(state.run_id, "bold"), f"?\n{what}"
        )

        def answered(yes: bool | None) -> None:
            if yes:
                self._cancelling.add(run)
                self._asked_to_leave = False
                self.say(f"{state.run_id}: cancelling …")
                threading.Thread(target=self._cancel, args=(run, state.kind), daemon=True).start()

        self.push_screen(Question(text), answered)

    def _cancel(self, run: RunDir, kind: str) -> None:
        def say(line: str) -> None:
            self._hand_over(lambda: self.say(line))

        try:
            poll_s = CANCEL_POLL_S.get(kind, ASK_EVERY_S)
            cancel.cancel([run], cancel.How(), say, slurm=self.source.slurm, poll_s=poll_s)
        except (HpcdlError, OSError) as error:
            say(str(error))
        finally:
            self._cancelling.discard(run)
            self._wake.set()


def _read_details(details: Details, picture: Picture, before: News) -> News | None:
    """What is new of the run that is open; None where nothing can be told."""
    view = next((row.view for row in picture.rows if row.view.run == details.run), None)
    if view is None:
        return None
    try:
        details.read(view)
    except OSError as error:
        return News(note=f"can't be read: {error.strerror}")
    same = details.lines_read == before.lines_read
    return News(
        log=before.log if same else tuple(details.log),
        lines_read=details.lines_read,
        events=tuple(details.events),
        times=tuple(details.times),
        note=details.note,
    )
