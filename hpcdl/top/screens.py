"""The two screens: all runs, and one run."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, cast

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Input, Static

from hpcdl.runs.store import RunDir
from hpcdl.top import details, frame
from hpcdl.top.reading import Row
from hpcdl.top.rows import SORTS, fit, layout, ordered, plain
from hpcdl.top.widgets import Lines, keys_line

if TYPE_CHECKING:
    from hpcdl.top.app import TopApp

Part = Literal["ranks", "logs", "events"]
PARTS: tuple[Part, ...] = ("ranks", "logs", "events")
PANE_LEAST, PANE_MOST = 7, 14
"""Lines about the chosen run under the table."""
WARNINGS_SHOWN = 3


class _TopScreen(Screen[None]):
    """What both share: the line of keys, which a message may stand in for a while."""

    KEYS: ClassVar[tuple[tuple[str, str], ...]]

    @property
    def top(self) -> TopApp:
        """The app, as what it is."""
        return cast("TopApp", self.app)

    @property
    def ready(self) -> bool:
        """Whether its parts are there: not yet, or no longer, where it has just come or is going."""
        return self.is_mounted and bool(self.query(Lines))

    def show(self) -> None:
        """Draws what is known now."""
        raise NotImplementedError

    def on_mount(self) -> None:
        """The first time."""
        self.show()

    def on_resize(self) -> None:
        """The terminal has another size."""
        self.call_after_refresh(self.show)

    def on_screen_resume(self) -> None:
        """Back from another screen."""
        self.show()

    def marked(self, row: Row, lines: list[Text]) -> list[Text]:
        """What is said about a run, with a mark where it is being cancelled."""
        if self.top.is_cancelling(row.view.run):
            lines[0].append("  being cancelled …", style="yellow")
        return lines

    def put(self, name: str, text: Text) -> None:
        """Sets a text of the screen."""
        self.query_one(f"#{name}", Static).update(text)

    def show_keys(self) -> None:
        """The last line: a message that is fresh, or the keys."""
        width, message = self.size.width, self.top.message()
        self.put("keys", plain(message, "bold") if message else keys_line(self.KEYS, width))


class RunsScreen(_TopScreen):
    """All runs: a table, and about the chosen one."""

    KEYS = (
        ("↑↓", "move"),
        ("⏎", "open"),
        ("/", "filter"),
        ("s", "sort"),
        ("c", "cancel"),
        ("l", "logs"),
        ("e", "events"),
        ("r", "refresh"),
        ("?", "help"),
        ("q", "quit"),
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter"),
        Binding("s", "sort(1)"),
        Binding("S", "sort(-1)"),
        Binding("c", "cancel"),
        Binding("l", "open('logs')"),
        Binding("e", "open('events')"),
        Binding("escape", "back"),
        Binding("q", "app.leave"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self._chosen: RunDir | None = None
        self._sort = "state"
        self._pattern = ""

    def compose(self) -> ComposeResult:
        """The screen's parts, from the top."""
        yield Static(id="head")
        yield Static(id="columns")
        yield Lines(choose=True, id="runs")
        yield Static(id="pane")
        yield Input(id="filter", placeholder="name, id, state, reason, node …", compact=True)
        yield Static(id="keys")

    def show(self) -> None:
        """Draws what is known now."""
        if not self.ready:
            return
        top, width = self.top, self.size.width
        self.rows = ordered(top.picture.rows, self._sort, self._pattern)
        wanted = top.source.wanted
        left = frame.heading(top.picture, wanted, self._sort, self._pattern, len(self.rows))
        right = frame.slurm_words(top.picture)
        self.put("head", fit(left, width - len(right)).append_text(right))
        lines = self.query_one("#runs", Lines)
        at = next((i for i, row in enumerate(self.rows) if row.view.run == self._chosen), lines.at)
        lines.fill(len(self.rows), self._line, at)
        self._chosen = self.rows[lines.at].view.run if self.rows else self._chosen
        # As wide as the lines under it, which a scrollbar may make narrower.
        self.put("columns", layout(lines.across or width).heading)
        self._show_pane()
        self.show_keys()

    def _line(self, index: int, width: int) -> Text:
        return layout(width).line(self.rows[index]) if index < len(self.rows) else Text("")

    def _show_pane(self) -> None:
        height = max(PANE_LEAST, min(PANE_MOST, self.size.height // 4))
        pane = self.query_one("#pane", Static)
        pane.styles.height = height + 1  # and its border
        row = self.row
        if row is not None:
            lines = self.marked(row, details.pane(row, self.size.width, height))
        elif self._pattern and self.top.picture.rows:
            lines = [plain(f"no run has {self._pattern!r} in it: Esc shows all")]
        else:
            lines = (
                [plain(frame.nothing(self.top.picture, self.top.source.wanted))] if self.top.looked else []
            )
        lines += [plain(fault, "red") for fault in self.top.picture.faults[: height - len(lines)]]
        for line in lines:
            line.truncate(self.size.width, overflow="ellipsis")
        pane.update(Text("\n").join(lines))

    @property
    def row(self) -> Row | None:
        """The chosen run."""
        at = self.query_one("#runs", Lines).at
        return self.rows[at] if at < len(self.rows) else None

    @on(Lines.Moved)
    def _moved(self) -> None:
        self._chosen = self.row.view.run if self.row is not None else None
        self._show_pane()

    @on(Lines.Entered)
    def _entered(self) -> None:
        self.action_open("ranks")

    def action_open(self, part: Part) -> None:
        """Into the chosen run."""
        if self.row is not None:
            self.top.open_run(self.row.view.run, part)

    def action_cancel(self) -> None:
        """Asks whether the chosen run shall end."""
        if self.row is not None:
            self.top.ask_to_cancel(self.row)

    def action_sort(self, by: int) -> None:
        """The next way of sorting."""
        names = list(SORTS)
        self._sort = names[(names.index(self._sort) + by) % len(names)]
        self.top.say(f"sorted by {self._sort} ({', '.join(names)})")
        self.show()

    def action_filter(self) -> None:
        """Asks for a pattern."""
        field = self.query_one("#filter", Input)
        field.display = True
        field.focus()

    def action_back(self) -> None:
        """Less the filter; without one, out."""
        if self._pattern or self.query_one("#filter", Input).display:
            self._end_filter("")
        else:
            self.top.action_leave()

    @on(Input.Changed, "#filter")
    def _filter_changed(self, event: Input.Changed) -> None:
        self._pattern = event.value.strip()
        self.show()

    @on(Input.Submitted, "#filter")
    def _filter_done(self, event: Input.Submitted) -> None:
        self._end_filter(event.value)

    def _end_filter(self, pattern: str) -> None:
        field = self.query_one("#filter", Input)
        field.value = pattern
        field.display = False
        self._pattern = pattern.strip()
        self.query_one("#runs", Lines).focus()
        self.show()


class RunScreen(_TopScreen):
    """One run: its ranks, its logs, its events.

    Args:
        run: the run.
        part: which of them is shown first.
    """

    KEYS = (
        ("⏎", "next part"),
        ("n", "ranks"),
        ("l", "logs"),
        ("e", "events"),
        ("↑↓←→", "scroll"),
        ("G", "end"),
        ("c", "cancel"),
        ("r", "refresh"),
        ("?", "help"),
        ("esc", "back"),
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("n,1", "part('ranks')"),
        Binding("l,2", "part('logs')"),
        Binding("e,3", "part('events')"),
        Binding("tab,enter", "next(1)", priority=True),
        Binding("shift+tab", "next(-1)", priority=True),
        Binding("c", "cancel"),
        Binding("escape,q,backspace", "back"),
    ]

    def __init__(self, run: RunDir, part: Part) -> None:
        super().__init__()
        self.run = run
        self.part: Part = part
        self._row: Row | None = None

    def on_mount(self) -> None:
        """Logs and events begin at their end."""
        self.action_part(self.part)

    def compose(self) -> ComposeResult:
        """The screen's parts, from the top."""
        yield Static(id="about")
        yield Static(id="tabs")
        yield Lines(id="body")
        yield Static(id="keys")

    @property
    def row(self) -> Row | None:
        """The run as it stands; as it was last, where its directory has gone."""
        found = next((row for row in self.top.picture.rows if row.view.run == self.run), None)
        self._row = found or self._row
        return self._row

    def show(self) -> None:
        """Draws what is known now."""
        row, width = self.row, self.size.width
        if row is None or not self.ready:
            return
        lines = self.marked(row, details.about(row, width))
        for line in lines:  # warnings may take more than one
            line.truncate(width, overflow="ellipsis")
        lines += [details.warning_line(each) for each in row.warnings[-WARNINGS_SHOWN:]]
        if all(each.view.run != self.run for each in self.top.picture.rows):
            lines.append(Text("its directory is gone", style="bold red"))
        self.put("about", Text("\n").join(lines))
        self.put("tabs", self._tabs(row))
        self._show_body(row)
        self.show_keys()

    def _tabs(self, row: Row) -> Text:
        news = self.top.news
        counts = {
            "ranks": f"{row.state.world_size}",
            "logs": f"{news.lines_read:,} lines" if news.lines_read else "",
            "events": f"{len(news.events)}" if news.events else "",
        }
        text = Text(no_wrap=True, end="")
        for part in PARTS:
            shown = f" {part} {counts[part]} ".replace("  ", " ")
            text.append(shown, style="reverse bold" if part == self.part else "dim").append("  ")
        if self.part == "logs" and news.note:
            text.append_text(plain(news.note, "yellow"))
        return text

    def _show_body(self, row: Row) -> None:
        body, news = self.query_one("#body", Lines), self.top.news
        if self.part == "logs":
            log = news.log
            body.fill(len(log), lambda index, _: details.log_line(log[index]))
        elif self.part == "events":
            events = news.events
            body.fill(len(events), lambda index, _: details.event_line(events[index]))
        else:
            ranks = details.rank_lines(row, news.times)
            lines = [*ranks, Text(""), *details.node_lines(row)] if row.nodes else []
            lines = lines or [plain(details.nothing_measured(row), "dim")]
            body.fill(len(lines), lambda index, _: lines[index].copy())

    def action_part(self, part: Part) -> None:
        """Another part."""
        self.part = part
        body = self.query_one("#body", Lines)
        body.fill(0, lambda *_: Text(""))
        body.following = part != "ranks"
        self.show()

    def action_next(self, by: int) -> None:
        """The next part."""
        self.action_part(PARTS[(PARTS.index(self.part) + by) % len(PARTS)])

    def action_cancel(self) -> None:
        """Asks whether the run shall end."""
        if self.row is not None:
            self.top.ask_to_cancel(self.row)

    def action_back(self) -> None:
        """To all runs."""
        self.top.close_run()
