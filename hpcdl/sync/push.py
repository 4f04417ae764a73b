"""`hpcdl sync`: which runs are sent, in which order, a line each, and the exit code."""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcdl import secrets
from hpcdl.errors import HpcdlError, ServerError, UsageError
from hpcdl.runs.state import ACTIVE
from hpcdl.runs.store import RunDir
from hpcdl.sync import record, story, target
from hpcdl.sync.courier import Courier

TRIES = 3
PAUSE_S = 2.0
"""Before the second try of a run; twice as long before each one after it."""
PROBE_S = 10.0
"""A server that doesn't answer within this counts as not reached."""
WAITING_S = 2.0
"""A lock that isn't free by then is spoken of."""
START_S = 60.0
"""In which the sending process has begun: a shared disk may be slow to import from."""
ROWS_PER_S = 200
"""Slowest rate at which rows are handed to wandb: the limit grows with a run's length."""
NO_KEY = (
    "wandb has no API key that {server} takes. Any of these will do:\n"
    "  wandb login                       asks for it and keeps it in ~/.netrc (--host URL for your own server)\n"
    "  export WANDB_API_KEY=…            for this shell\n"
    "hpcdl itself never writes it down."
)
NO_WANDB = (
    "sending to wandb needs the wandb package, here on the login node only:\n"
    "  {python} -m pip install 'wandb>=0.31,<1'      (or hpcdl[wandb])"
)
NO_BOARD = (
    "event files need the tensorboard package:\n"
    "  {python} -m pip install 'tensorboard>=2.17'      (or hpcdl[tensorboard])"
)
_WANDB_RUN = re.compile(r"^tracker:\n(?:[ ].*\n)*?[ ]+name: wandb$", re.MULTILINE)
_KEY_FAULT = re.compile(r"api[ _]key|not logged in|\b401\b|unauthori[sz]ed", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the command was asked for."""

    board: Path | None = None
    """Event files go below this folder; None: to wandb."""
    project: str | None = None
    """Instead of the experiments'."""
    entity: str | None = None
    named: bool = True
    """The runs were named; else, of all there are, those that have nothing new are only counted."""
    limit_s: float = 300.0
    """How long the server may take at the beginning and at the end of a run."""


@dataclass(slots=True)
class Tally:
    """How many runs ended how."""

    sent: int = 0
    there: int = 0
    waiting: int = 0
    """Nothing to send yet."""
    failed: list[str] = field(default_factory=list)


def wants_wandb(run: RunDir) -> bool:
    """Whether a run was configured with tracker=wandb; cheap, since 10,000 runs are asked."""
    try:
        return _WANDB_RUN.search(run.spec_file.read_text(encoding="utf-8")) is not None
    except (OSError, UnicodeDecodeError):
        return False


class Push:
    """Sends runs to one place.

    Args:
        wish: what was asked for.
        say: prints a line.
        courier: who sends; None: a process of its own, once it is needed.
    """

    def __init__(self, wish: Wish, say: Callable[[str], None], courier: Courier | None = None) -> None:
        self._wish = wish
        self._say = say
        self._server = target.base_url()
        self._kind = "wandb" if wish.board is None else "tensorboard"
        self._courier = courier
        self._borrowed = courier is not None
        self.tally = Tally()

    def plan(self, runs: Iterable[RunDir]) -> None:
        """Says what would be sent, and sends nothing."""
        self._each(runs, self._plan_one)

    def _each(self, runs: Iterable[RunDir], act: Callable[[RunDir], None]) -> None:
        """Does it to all that may have news; one that can't be read is told, and the others go on."""
        for run in runs:
            if self._passed_over(run):
                continue
            try:
                act(run)
            except (UsageError, OSError) as error:
                self._fail(run, run.path.parent.name, str(error))

    def _plan_one(self, run: RunDir) -> None:
        head = story.read_head(run)
        known = record.read(run, self._place(head))
        if self._up_to_date(run, head, known):
            return
        if count := sum(1 for _ in story.rows_of(run)):
            again = f"; {_rows(known.sent.rows)} were sent {known.sent.time[:19]}" if known.sent else ""
            self._line(run, head.name, f"would send {_rows(count)} to {self._where(head)}{again}")
            self.tally.sent += 1
        else:
            self._line(run, head.name, "nothing to send yet")
            self.tally.waiting += 1

    def send(self, runs: Iterable[RunDir]) -> None:
        """Sends what isn't there.

        Raises:
            UsageError: wandb isn't installed, or has no key that the server takes.
            ServerError: the server doesn't answer, or doesn't take what it is sent.
        """
        try:
            self._each(runs, self._one)
        finally:
            if self._courier is not None and not self._borrowed:
                self._courier.close()

    def _passed_over(self, run: RunDir) -> bool:
        """Whether a run that nobody named has nothing new, told without reading its experiment."""
        wish = self._wish
        if wish.named or wish.board or wish.project or wish.entity or not record.has_all(run, self._server):
            return False
        self.tally.there += 1
        return True

    def _one(self, run: RunDir) -> None:
        head = story.read_head(run)
        place = self._place(head)
        if self._up_to_date(run, head, record.read(run, place)):
            return
        with record.held(run, self._kind, self._waiting(run, head, place)) as mine:
            if not mine:
                self._line(run, head.name, "is sent by its own try, as it goes on")
                self.tally.waiting += 1
                return
            if self._up_to_date(run, head, record.read(run, place)):
                return
            stamp = record.stamp(run)
            if "metrics.jsonl" not in stamp and not any(name.startswith("system-") for name in stamp):
                self._line(run, head.name, "nothing to send yet")
                self.tally.waiting += 1
                return
            answer = self._ask(run, head, place, stamp)
        if answer["done"] == "sent":
            self.tally.sent += 1
            self._line(run, head.name, f"sent: {_rows(answer['rows'])} at {answer['url']}")
        else:
            self.tally.there += 1
            self._line(run, head.name, f"up to date: {_rows(answer['rows'])} are there")

    def _waiting(self, run: RunDir, head: story.Head, place: str) -> Callable[[], bool]:
        """Whether to wait on for a lock that another process has; says once that it does."""
        since = time.monotonic()
        said = False

        def wait() -> bool:
            nonlocal said
            if record.read(run, place).live:
                return False
            if not said and time.monotonic() - since > WAITING_S:
                said = True
                self._line(run, head.name, "waits: another hpcdl sync is sending it")
            return True

        return wait

    def _up_to_date(self, run: RunDir, head: story.Head, known: record.Place) -> bool:
        sent = known.sent
        if sent is None or sent.stamp != record.stamp(run):
            return False
        self._line(run, head.name, f"up to date: {_rows(sent.rows)}, sent {sent.time[:19]}")
        self.tally.there += 1
        return True

    def _ask(self, run: RunDir, head: story.Head, place: str, stamp: record.Stamp) -> dict[str, Any]:
        order = {
            "do": "send",
            "run": str(run.path),
            "to": self._kind,
            "folder": str(self._folder(head)) if self._wish.board else None,
            "place": place,
            "project": self._wish.project,
            "entity": self._wish.entity,
            "limit_s": self._wish.limit_s,
        }
        # Every line of metrics is at least 50 bytes long.
        limit_s = START_S + 3 * self._wish.limit_s + stamp.get("metrics.jsonl", [0])[0] / 50 / ROWS_PER_S
        probe_s, fault = min(PROBE_S, self._wish.limit_s), ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE_S * 2 ** (attempt - 1))
                self._line(run, head.name, f"tried again: {fault}")
            if self._wish.board is None and (silent := target.unreached(self._server, probe_s)):
                fault = f"{secrets.mask(self._server)} doesn't answer: {silent}"
                continue
            answer = self._sender().ask(order, limit_s)
            fault = str(answer.get("fault", ""))
            if not fault:
                return answer
            if _KEY_FAULT.search(fault):
                raise CannotSendError(
                    f"{NO_KEY.format(server=secrets.mask(self._server))}\n(wandb says: {fault})"
                )
            if self._wish.board is not None:
                raise UsageError(fault)
        raise ServerError(f"{run.path.name} was not sent: {fault}")

    def _sender(self) -> Courier:
        """The process that sends, once it is known that it can.

        Raises:
            CannotSendError: a package is missing.
        """
        if self._courier is None:
            package, words = ("wandb", NO_WANDB) if self._wish.board is None else ("tensorboard", NO_BOARD)
            found = importlib.util.find_spec(package)
            if found is None or found.origin is None:  # a mere folder of that name is no package
                raise CannotSendError(words.format(python=sys.executable))
            self._courier = Courier(self._server)
        return self._courier

    def _place(self, head: story.Head) -> str:
        """Names where a run goes, in its record."""
        if self._wish.board is not None:
            return f"tensorboard {self._folder(head)}"
        return self._where(head)

    def _where(self, head: story.Head) -> str:
        if self._wish.board is not None:
            return str(self._folder(head))
        return record.name_of(
            self._server, self._wish.entity or head.entity, self._wish.project or head.project
        )

    def _folder(self, head: story.Head) -> Path:
        assert self._wish.board is not None
        return self._wish.board.absolute() / head.name / head.run_id

    def _fail(self, run: RunDir, name: str, words: str) -> None:
        self.tally.failed.append(run.path.name)
        self._line(run, name, f"not sent: {words}")

    def _line(self, run: RunDir, name: str, words: str) -> None:
        self._say(secrets.hide(f"{run.path.name}  {name}  {words}"))


class CannotSendError(HpcdlError):
    """No run at all can be sent before the user has done something."""

    exit_code = 2


def active(runs: Iterable[RunDir]) -> bool:
    """Whether any of the runs goes on, as its state says."""
    return any(run.read_state().state in ACTIVE for run in runs)


def _rows(count: int) -> str:
    return f"{count} row{'s' if count != 1 else ''}"
