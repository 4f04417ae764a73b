"""Lines that scroll, a row of keys, a question: what the screens are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.geometry import Size
from textual.message import Message
from textual.screen import ModalScreen
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widgets import Static

from hpcdl.top.rows import fit

CHOSEN = Style(reverse=True)
"""The chosen line: it shows in dark and light terminals, and without colours."""
SIDE = 20
"""Characters that one press of ← or → goes along."""


class Lines(ScrollView, can_focus=True):
    """Lines of which only those on the screen are made.

    Args:
        choose: whether one of them is chosen, and moves with the keys; otherwise they scroll.
        id: for the style sheet.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup,ctrl+b", "page(-1)", show=False),
        Binding("pagedown,ctrl+f,space", "page(1)", show=False),
        Binding("home,g", "first", show=False),
        Binding("end,G", "last", show=False),
        Binding("left,h", "side(-1)", show=False),
        Binding("right", "side(1)", show=False),
        Binding("enter", "enter", show=False),
    ]

    class Moved(Message):
        """Another line was chosen."""

    class Entered(Message):
        """The chosen line was entered."""

    def __init__(self, *, choose: bool = False, id: str | None = None) -> None:
        super().__init__(id=id)
        self._choose = choose
        self._make: Callable[[int, int], Text] = lambda index, width: Text("")
        self.count = 0
        self.at = 0
        """The chosen line."""
        self.following = False
        """Whether the last line stays in sight as lines come."""
        self._aside = 0

    @property
    def across(self) -> int:
        """Characters that a line has."""
        return self.scrollable_content_region.width

    def fill(self, count: int, make: Callable[[int, int], Text], at: int | None = None) -> None:
        """Shows other lines.

        Args:
            count: how many there are.
            make: makes a line of its number and the width.
            at: which is chosen; None: as before.
        """
        self._make, self.count = make, count
        self.at = max(0, min(self.at if at is None else at, count - 1))
        if self.virtual_size.height != count:
            self.virtual_size = Size(0, count)
        if self.following:
            self.scroll_to(y=count, animate=False, force=True, immediate=True)
        elif self._choose:
            self._keep_in_sight()
        self.refresh()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Whoever goes up wants to read there; whoever goes to the end wants to see what comes."""
        super().watch_scroll_y(old_value, new_value)
        self.following = not self._choose and self.at_end and (self.following or new_value > old_value)

    def render_line(self, y: int) -> Strip:
        """One line of the screen."""
        index, width = self.scroll_offset.y + y, self.across
        if index >= self.count:
            return Strip.blank(self.size.width)
        text = self._make(index, width)
        if self._aside:
            text = text[self._aside :] if self._aside < len(text) else Text("")
        if self._choose and index == self.at:
            text = Text(text.plain, style=CHOSEN)  # in one colour: several, reversed, are a patchwork
        console = self.app.console
        segments = fit(text, width).render(console)  # of a text without spans it leaves its own style out
        return Strip(Segment.apply_style(segments, console.get_style(text.style)), width)

    def _keep_in_sight(self) -> None:
        top, height = self.scroll_offset.y, self.scrollable_content_region.height
        if self.at < top or height == 0:
            self.scroll_to(y=self.at, animate=False, force=True, immediate=True)
        elif self.at >= top + height:
            self.scroll_to(y=self.at - height + 1, animate=False, force=True, immediate=True)

    def _go(self, index: int) -> None:
        self.at = max(0, min(index, self.count - 1))
        self._keep_in_sight()
        self.refresh()
        self.post_message(self.Moved())

    def action_move(self, by: int) -> None:
        """A line up or down."""
        if self._choose:
            self._go(self.at + by)
        else:
            self._scroll(self.scroll_offset.y + by)

    def action_page(self, by: int) -> None:
        """A page up or down."""
        step = max(1, self.scrollable_content_region.height - 1) * by
        if self._choose:
            self._go(self.at + step)
        else:
            self._scroll(self.scroll_offset.y + step)

    def action_first(self) -> None:
        """To the beginning."""
        if self._choose:
            self._go(0)
        else:
            self._scroll(0)

    def action_last(self) -> None:
        """To the end."""
        if self._choose:
            self._go(self.count - 1)
        else:
            self._scroll(self.count)

    def action_side(self, by: int) -> None:
        """Along long lines."""
        self._aside = max(0, self._aside + SIDE * by)
        self.refresh()

    def action_enter(self) -> None:
        """Into the chosen line."""
        if self._choose and self.count:
            self.post_message(self.Entered())

    def _scroll(self, to: float) -> None:
        self.scroll_to(y=to, animate=False, force=True, immediate=True)
        self.refresh()

    @property
    def at_end(self) -> bool:
        """Whether the last line is in sight."""
        return self.scroll_offset.y + self.scrollable_content_region.height >= self.count

    def on_click(self, event: events.Click) -> None:
        """Chooses a line; twice enters it."""
        index = self.scroll_offset.y + event.y
        if self._choose and index < self.count:
            self._go(index)
            if event.chain == 2:
                self.action_enter()


def keys_line(keys: Sequence[tuple[str, str]], width: int) -> Text:
    """Keys and what they do, as many as fit.

    Args:
        keys: (key, what it does), the most important first; the last two are always shown.
        width: characters.
    """
    *first, help_key, back = keys
    last = [help_key, back]
    room = width - sum(len(key) + len(what) + 2 for key, what in last)
    shown = []
    for key, what in first:
        room -= len(key) + len(what) + 2
        if room < 0:
            break
        shown.append((key, what))
    text = Text(no_wrap=True, end="")
    for key, what in [*shown, *last]:
        text.append(key, style="bold").append(f" {what} ", style="dim")
    return text


class Question(ModalScreen[bool]):
    """Asks; Enter alone is no yes.

    Args:
        text: the question.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)"),
        Binding("n,escape,q,enter", "answer(False)"),
    ]

    def __init__(self, text: Text) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        """The box."""
        keys = Text.assemble(("y", "bold"), " yes   ", ("n", "bold"), " no")
        yield Static(Text("\n\n").join([self._text, keys]), classes="box")

    def action_answer(self, answer: bool) -> None:
        """Closes it."""
        self.dismiss(answer)


class Page(ModalScreen[None]):
    """A text to read; any of the keys closes it.

    Args:
        text: what it says.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,enter,question_mark", "close")]

    def __init__(self, text: Text) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        """The box."""
        with VerticalScroll(classes="box"):
            yield Static(self._text)

    def action_close(self) -> None:
        """Closes it."""
        self.dismiss(None)
