"""Experiment trackers beside metrics.jsonl. They may fail; the training may not fail of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hpcdl import secrets
from hpcdl.runs.store import RunDir
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.plain import to_plain


class Tracker:
    """Tracks nothing; base of those that do."""

    def log(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""

    def finish(self, result: dict[str, Any]) -> None:
        """The result, as the last act."""


class Wandb(Tracker):
    """Weights & Biases. One segment a try: several segments with one id don't append reliably offline.

    Tries of a run, and runs of a sweep, are held together by the group.
    """

    def __init__(self, spec: ExperimentSpec, run: RunDir, attempt: str) -> None:
        import wandb

        tracker = spec.tracker
        self._run = wandb.init(
            project=tracker.project,
            entity=tracker.entity,
            mode=tracker.mode,
            group=_sweep_of(run) or spec.name,
            name=f"{spec.name}-{run.path.name}",
            id=f"{run.path.name}-{attempt.replace('.', '-')}",
            tags=[*tracker.tags, f"try-{attempt}"],
            dir=str(run.path),
            config=_without_secrets(to_plain(spec)),
            # Neither the terminal nor signals are wandb's: the agent writes the log, workers stop together. Nor is
            # the code: code/ has what git had, and wandb would send it away.
            settings=wandb.Settings(
                console="off", silent=True, x_disable_meta=False, disable_git=True, save_code=False
            ),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, record: dict[str, Any]) -> None:
        """Loss and the rest over `step`."""
        self._run.log({key: value for key, value in record.items() if value is not None})

    def finish(self, result: dict[str, Any]) -> None:
        """Puts the result into the run's summary and closes the segment."""
        self._run.summary.update({k: v for k, v in result.items() if isinstance(v, int | float | str)})
        self._run.finish()


class TensorBoard(Tracker):
    """TensorBoard event files in `<run_dir>/tensorboard`."""

    def __init__(self, spec: ExperimentSpec, run: RunDir, attempt: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"), filename_suffix=f".try-{attempt}")

    def log(self, record: dict[str, Any]) -> None:
        """A scalar a number."""
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, record["step"])

    def finish(self, result: dict[str, Any]) -> None:
        """Closes the files."""
        self._writer.close()


class Guarded(Tracker):
    """Takes a tracker's every exception for itself: one event, and no tracking from then on."""

    def __init__(self, make: Callable[[], Tracker], name: str, run: RunDir) -> None:
        self._name = name
        self._run = run
        self._inner: Tracker | None = None
        self._guard(lambda: setattr(self, "_inner", make()))

    def log(self, record: dict[str, Any]) -> None:
        """Passed on."""
        if self._inner is not None:
            self._guard(lambda: self._inner.log(record))  # type: ignore[union-attr]

    def finish(self, result: dict[str, Any]) -> None:
        """Passed on."""
        if self._inner is not None:
            self._guard(lambda: self._inner.finish(result))  # type: ignore[union-attr]

    def _guard(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self._inner = None
            why = secrets.hide(f"{type(error).__name__}: {error}")
            message = f"tracker {self._name} failed and is off from here: {why}"
            self._run.event("warning", message=message)
            print(message, flush=True)


KINDS: dict[str, Callable[[ExperimentSpec, RunDir, str], Tracker]] = {
    "wandb": Wandb,
    "tensorboard": TensorBoard,
}


def start(spec: ExperimentSpec, run: RunDir, attempt: str, *, active: bool) -> Tracker:
    """The tracker that the experiment asks for; one that does nothing on other ranks than 0."""
    kind = KINDS.get(spec.tracker.name)
    if kind is None or not active:
        return Tracker()
    return Guarded(lambda: kind(spec, run, attempt), spec.tracker.name, run)


def _without_secrets(plain: Any) -> Any:
    """A config as it may leave this machine: the launcher has refused secrets, and can have missed one."""
    if isinstance(plain, dict):
        return {key: _without_secrets(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_without_secrets(value) for value in plain]
    return secrets.hide(secrets.mask(plain)) if isinstance(plain, str) else plain


def _sweep_of(run: RunDir) -> str | None:
    try:
        return str(json.loads((run.path / "sweep.json").read_text(encoding="utf-8"))["sweep"])
    except (OSError, json.JSONDecodeError, KeyError):
        return None
