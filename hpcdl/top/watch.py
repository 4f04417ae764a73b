"""The runs that are looked at: read every few seconds, and asked for at Slurm every 30 s, all of them in one batch.

Two threads use a `Watch`: one calls `refresh` (files), one `ask` (Slurm, which may take its time).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcdl.errors import HpcdlError
from hpcdl.runs import query, words
from hpcdl.runs.reconcile import View, reconcile
from hpcdl.runs.scheduler import Slurm
from hpcdl.runs.state import ACTIVE, RunState
from hpcdl.runs.store import RunDir, all_runs
from hpcdl.top.reading import Row, RunReader

ASK_EVERY_S = 30.0
"""Between two times that Slurm is asked, at least."""
SCAN_EVERY_S = 10.0
"""Between two looks for new runs; more where a look takes long."""
LOCAL_EVERY_S = 5.0
"""Between two looks at whether the agents of local runs are alive."""
RECENT_S = 3600.0
"""Runs that ended so long ago are shown without --all."""
BUDGET_S = 0.5
"""Of one turn, for runs that have not been read yet: a first look at ten thousand takes several."""
AGAIN_S = 0.05
"""Of one turn, for runs that are not shown: whether they have begun anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which runs."""

    folder: Path
    """Of all runs."""
    queries: tuple[str, ...] = ()
    """What the user named; all of these are shown. Empty: the whole folder."""
    everything: bool = False
    """Those that ended long ago, too."""

    def shows(self, state: RunState) -> bool:
        """Whether a run in this state is shown."""
        if self.everything or self.queries or state.state in ACTIVE:
            return True
        return words.parse(state.ended) is not None and words.since(state.ended) < RECENT_S


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmNews:
    """How asking Slurm stands."""

    needed: bool = False
    """Whether any active run that is shown is Slurm's."""
    asked_ago_s: float | None = None
    """Null: not yet."""
    next_in_s: float = 0.0
    """Before that it isn't asked again."""
    away: str = ""
    """Why it did not answer, the last time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """All that is known at one moment."""

    rows: tuple[Row, ...] = ()
    hidden: int = 0
    """Runs that ended earlier, and are not shown."""
    unread: int = 0
    """Runs whose state is still to be read."""
    faults: tuple[str, ...] = ()
    """Of runs that can't be read."""
    slurm: SlurmNews = SlurmNews()
    took_s: float = 0.0
    """What this look took."""


class Watch:
    """Reads and asks.

    Args:
        wanted: which runs.
        slurm: whom to ask.
        clock: seconds that only grow; tests give their own.
    """

    def __init__(
        self, wanted: Wanted, slurm: Slurm | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.wanted = wanted
        self.slurm = slurm or Slurm()
        self._clock = clock
        self._runs: dict[RunDir, RunReader] = {}
        self._shown: dict[RunDir, RunReader] = {}
        self._rest: deque[RunDir] = deque()
        """Runs that are not shown, the one that was looked at longest ago first."""
        self._faults: dict[RunDir, str] = {}
        self._scanned = self._checked_local = float("-inf")
        self._scan_every_s = SCAN_EVERY_S
        self._lock = threading.Lock()
        self._views: dict[RunDir, tuple[RunState, View]] = {}
        """What was read when a run was judged, and the judgement."""
        self._asked = float("-inf")
        self._away = ""

    # --- Slurm ---

    def ask_due(self) -> bool:
        """Whether Slurm is to be asked, and may be."""
        return self._next_in_s() <= 0 and bool(self._to_ask())

    def ask(self) -> bool:
        """Asks Slurm for all active runs of its at once, unless that was less than 30 s ago; whether it did."""
        with self._lock:
            views = self._to_ask()
            if self._next_in_s() > 0 or not views:
                return False
            self._asked = self._clock()
        self._judge(views)
        return True

    def _next_in_s(self) -> float:
        return max(0.0, self._asked + ASK_EVERY_S - self._clock())

    def _to_ask(self) -> list[View]:
        return [
            View(run=reader.run, state=reader.state)
            for reader in list(self._shown.values())
            if reader.state is not None and reader.state.state in ACTIVE and reader.state.kind != "local"
        ]

    def _judge(self, views: Sequence[View]) -> None:
        try:
            judged = reconcile(views, self.slurm)
            self._away = next((view.unchecked for view in judged if view.since), "")
        except (HpcdlError, OSError) as error:
            # A run's folder went while it was looked at, say. The next time will tell.
            self._away = f"its answer could not be used: {error}"
            return
        with self._lock:
            for before, after in zip(views, judged, strict=True):
                self._views[before.run] = (before.state, after)

    # --- files ---

    def refresh(self) -> Picture:
        """Reads what is new."""
        began = self._clock()
        if began - self._scanned >= self._scan_every_s:
            self._scan()
        submissions: dict[str, dict[str, Any]] = {}
        for reader in list(self._shown.values()):
            self._look(reader, submissions)
        self._look_at_rest(submissions)
        self._check_local()
        rows = self._rows()
        unread = sum(run not in self._faults and self._runs[run].state is None for run in self._rest)
        return Picture(
            rows=tuple(rows),
            hidden=len(self._rest) - unread - sum(run in self._faults for run in self._rest),
            unread=unread + sum(row.unread for row in rows),
            faults=tuple(sorted(self._faults.values())),
            slurm=self._news(),
            took_s=self._clock() - began,
        )

    def _scan(self) -> None:
        began = self._clock()
        folder, queries = self.wanted.folder, self.wanted.queries
        found = set(query.find_all(queries, folder) if queries else all_runs(folder))
        for run in found - self._runs.keys():
            self._runs[run] = RunReader(run)
            self._rest.appendleft(run)  # a new one is looked at first
        gone = self._runs.keys() - found
        for run in gone:
            self._forget(run)
        if gone:
            self._rest = deque(run for run in self._rest if run not in gone)
        self._scanned = self._clock()
        self._scan_every_s = max(SCAN_EVERY_S, 20 * (self._scanned - began))

    def _forget(self, run: RunDir) -> None:
        self._runs.pop(run, None)
        self._shown.pop(run, None)
        self._faults.pop(run, None)
        with self._lock:
            self._views.pop(run, None)

    def _look_at_rest(self, submissions: dict[str, dict[str, Any]]) -> None:
        began = self._clock()
        for _ in range(len(self._rest)):
            run = self._rest.popleft()
            budget_s = AGAIN_S if self._runs[run].state is not None else BUDGET_S
            self._look(self._runs[run], submissions)
            if run in self._runs and run not in self._shown:
                self._rest.append(run)
            if self._clock() - began > budget_s:
                return

    def _look(self, reader: RunReader, submissions: dict[str, dict[str, Any]]) -> None:
        """Reads a state, and puts the run among those that are shown or the rest."""
        run = reader.run
        try:
            state = reader.look(submissions)
            self._faults.pop(run, None)
        except FileNotFoundError:
            self._forget(run)
            return
        except (HpcdlError, OSError) as error:
            self._faults[run] = str(error)
            return
        if self.wanted.shows(state) == (run in self._shown):
            return
        if run in self._shown:
            del self._shown[run]
            self._runs[run] = RunReader(run)  # less what it has read
            self._rest.append(run)
        else:
            self._shown[run] = reader

    def _check_local(self) -> None:
        if self._clock() - self._checked_local < LOCAL_EVERY_S:
            return
        self._checked_local = self._clock()
        for reader in list(self._shown.values()):
            state = reader.state
            if state is None or state.kind != "local" or state.state not in ACTIVE:
                continue
            try:
                view = reconcile([View(run=reader.run, state=state)], self.slurm)[0]
            except (HpcdlError, OSError):
                continue  # its folder went, or can't be read: the next look tells
            with self._lock:
                self._views[reader.run] = (state, view)

    def _rows(self) -> list[Row]:
        began, first = self._clock(), 0
        rows = []
        for reader in list(self._shown.values()):
            first += not reader.has_read
            if not reader.has_read and first > 1 and self._clock() - began > BUDGET_S:
                rows.append(Row(view=self._view(reader), unread=True))
            elif (row := self._row(reader)) is not None:
                rows.append(row)
        return rows

    def _row(self, reader: RunReader) -> Row | None:
        try:
            return reader.row(self._view(reader))
        except FileNotFoundError:
            return None  # it is going; the next look forgets it
        except OSError as error:
            self._faults[reader.run] = f"{reader.run.path}: can't be read ({error.strerror})"
            return Row(view=self._view(reader))

    def _view(self, reader: RunReader) -> View:
        """How a run stands: as it was judged, as long as its file says what it said then, or what was judged."""
        assert reader.state is not None
        with self._lock:
            before, judged = self._views.get(reader.run, (None, None))
        if judged is not None and reader.state in (before, judged.state):
            return judged
        return View(run=reader.run, state=reader.state)

    def _news(self) -> SlurmNews:
        asked = None if self._asked == float("-inf") else self._clock() - self._asked
        return SlurmNews(
            needed=bool(self._to_ask()),
            asked_ago_s=asked,
            next_in_s=self._next_in_s(),
            away=self._away,
        )
