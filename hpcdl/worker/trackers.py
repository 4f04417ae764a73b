"""Experiment trackers beside metrics.jsonl: live, by a process of their own. They may fail; the training may not.

The process (hpcdl.sync.sender) reads what the run writes anyway, so a server that hangs, or a tracker's memory, is
nothing to the training. It ends with the rank that started it. What it could not send, `hpcdl sync` sends.
"""

from __future__ import annotations

from collections.abc import Callable

from hpcdl import secrets
from hpcdl.runs.store import RunDir
from hpcdl.spec import ExperimentSpec
from hpcdl.sync import record, target
from hpcdl.sync.courier import Courier

FINISH_S = 60.0
"""How long the end of a run waits for its tracker."""
STOPPED_S = 5.0
"""The same where the run was told to stop."""
LIMIT_S = 90.0
"""How long a server may take to answer."""


class Tracker:
    """Tracks nothing; base of those that do."""

    def finish(self, limit_s: float = FINISH_S) -> None:
        """The last act, when all lines are written; it may take so many seconds."""


class Live(Tracker):
    """Rows go to a tracker as they are written."""

    def __init__(self, spec: ExperimentSpec, run: RunDir) -> None:
        tracker, server, folder = spec.tracker, target.base_url(), run.path / "tensorboard"
        is_wandb = tracker.name == "wandb"
        place = (
            record.name_of(server, tracker.entity, tracker.project) if is_wandb else f"tensorboard {folder}"
        )
        self._courier = Courier(server, quiet=False)
        self._courier.give(
            {
                "do": "follow",
                "run": str(run.path),
                "to": tracker.name,
                "place": place,
                "folder": str(folder),
                "limit_s": LIMIT_S,
            }
        )

    def finish(self, limit_s: float = FINISH_S) -> None:
        """Lets the process send the rest.

        Raises:
            RuntimeError: it could not, or not in time.
        """
        self._courier.give({"do": "end"})
        fault = self._courier.answer(limit_s).get("fault")
        self._courier.close()
        if fault:
            raise RuntimeError(str(fault))


class Guarded(Tracker):
    """Takes a tracker's every exception for itself: one event, and no tracking from then on."""

    def __init__(self, make: Callable[[], Tracker], name: str, run: RunDir) -> None:
        self._name = name
        self._run = run
        self._inner: Tracker | None = None
        self._guard(lambda: setattr(self, "_inner", make()))

    def finish(self, limit_s: float = FINISH_S) -> None:
        """Passed on."""
        if (inner := self._inner) is not None:
            self._guard(lambda: inner.finish(limit_s))

    def _guard(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self._inner = None
            why = secrets.hide(str(error))
            message = f"tracker {self._name}: {why}; `hpcdl sync {self._run.path.name}` sends the run"
            self._run.event("warning", message=message)
            print(message, flush=True)


def start(spec: ExperimentSpec, run: RunDir, *, active: bool) -> Tracker:
    """The tracker that the experiment asks for; one that does nothing on other ranks than 0.

    Call it when metrics.jsonl holds no step of a lost try any more.
    """
    tracker = spec.tracker
    if not active or tracker.name == "none":
        return Tracker()
    if tracker.name == "wandb" and tracker.mode == "offline":
        print(
            f"tracker wandb, offline: `hpcdl sync {run.path.name}` on the login node sends this run",
            flush=True,
        )
        return Tracker()
    return Guarded(lambda: Live(spec, run), tracker.name, run)
