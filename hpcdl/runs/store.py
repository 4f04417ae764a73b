"""Run directories: where they are, what is in them, how their state is read and changed.

<runs_dir>/<name>/<run_id>/       one run (its files: see docs/architecture.md)
<runs_dir>/.submissions/<token>/  one sbatch: job.sh, runs.txt (a run directory a line), submission.json
<runs_dir>/latest                 link to the run launched last
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from hpcdl.errors import UsageError
from hpcdl.runs.files import append_line, last_line, locked, read_lines, write_json
from hpcdl.runs.private import read_text
from hpcdl.runs.state import RunState, State
from hpcdl.secrets import hide

SUBMISSIONS = ".submissions"
RUNNER = "runner.json"
"""In a local submission's folder: `{pid, started, host}` of the shell that starts its runs in turn."""


def now() -> str:
    """This moment in UTC, to the millisecond, as it stands in all files of a run."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True)
class RunDir:
    """One run's directory. Holds no state of its own: each call reads the files."""

    path: Path

    @property
    def spec_file(self) -> Path:
        """The resolved experiment, the one thing that crosses to the compute nodes."""
        return self.path / "spec.yaml"

    @property
    def job_file(self) -> Path:
        """Exactly what was submitted."""
        return self.path / "job.sh"

    @property
    def state_file(self) -> Path:
        """The state, replaced atomically."""
        return self.path / "state.json"

    @property
    def events_file(self) -> Path:
        """What happened, a line each."""
        return self.path / "events.jsonl"

    @property
    def metrics_file(self) -> Path:
        """A line a logged step, and a line an evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        """A file a node and a try: `<node>-try<attempt>.<requeue>.log`."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        """Folders `step-00000100`."""
        return self.path / "checkpoints"

    @property
    def errors(self) -> Path:
        """What each failing rank said: `try<attempt>.<requeue>-restart<n>-rank<r>.json`."""
        return self.path / "errors"

    @property
    def outcome_file(self) -> Path:
        """Written by rank 0 as its last act: how the loop ended (`finished`, or `stopped` and why)."""
        return self.path / "outcome.json"

    @property
    def result_file(self) -> Path:
        """Loss and perplexity before and after, as JSON; beside it card.md and loss.png."""
        return self.path / "result.json"

    @property
    def stop_file(self) -> Path:
        """Its presence asks the workers to save and stop; its first word says why (`cancel`)."""
        return self.path / "STOP"

    def read_state(self, submissions: dict[str, dict[str, Any]] | None = None) -> RunState:
        """The state as the file has it, the job id of a pending job added from its submission.

        Args:
            submissions: what `read_submission` gave before, by token; a caller that reads many runs passes
                one dict to all calls.

        Raises:
            FileNotFoundError: no run was ever launched here.
            UsageError: the file can't be read, or is no state of hpcdl's.
        """
        state = parse_state(self._read_plain(), self.state_file)
        if state.job_id is None and state.submission is not None:
            job_id = self._submission(state.submission, submissions).get("job_id")
            if job_id is not None:
                mark = "-" if state.kind == "kubernetes" else "_"  # a Job's own name
                task = "" if state.array_index is None else f"{mark}{state.array_index}"
                state = dataclasses.replace(state, job_id=f"{job_id}{task}")
        return state

    def _submission(self, token: str, known: dict[str, dict[str, Any]] | None) -> dict[str, Any]:
        if known is None:
            return read_submission(self.runs_dir, token)
        if token not in known:
            known[token] = read_submission(self.runs_dir, token)
        return known[token]

    def _read_plain(self) -> dict[str, Any]:
        try:
            plain = json.loads(_read_replaced(self.state_file))
        except PermissionError as error:
            raise UsageError(f"{self.state_file}: you may not read it (permission denied)") from error
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise UsageError(f"{self.state_file}: not a state file that hpcdl wrote (no file)") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{self.state_file}: not a state file that hpcdl wrote ({error})") from error
        if not isinstance(plain, dict):
            raise UsageError(f"{self.state_file}: not a state file that hpcdl wrote (no JSON object)")
        return plain

    def write_state(self, state: RunState, *, durable: bool = True) -> None:
        """Replaces the state."""
        write_json(self.state_file, dataclasses.asdict(state), durable=durable, into_own_block=True)

    def update(
        self,
        expect: RunState | None = None,
        event: tuple[str, dict[str, Any]] | None = None,
        guard: Callable[[RunState], None] | None = None,
        **changes: Any,
    ) -> RunState:
        """Changes fields of the state under the run's lock.

        Args:
            expect: only change the state if it still is this one (as `read_state` gave it): someone who
                decided on old knowledge must not overwrite what has happened since.
            event: kind and details of an event to append if, and only if, the state was changed.
            guard: raises if the state as it stands may not be changed.
            **changes: fields and their new values.

        Returns:
            The state that stands in the file afterwards.

        Raises:
            UsageError: the run is someone else's and may not be changed.
        """
        if "reason" in changes:
            changes["reason"] = hide(changes["reason"])
        try:
            with locked(self.path / ".lock"):
                state = self.read_state()
                if expect is not None and state != expect:
                    return state
                if guard is not None:
                    guard(state)
                changed = dataclasses.replace(state, **changes)
                # Keys that a newer hpcdl has written stay as they are.
                full = {**self._read_plain(), **dataclasses.asdict(changed)}
                write_json(self.state_file, full, into_own_block=True)
                if event is not None:
                    self.event(event[0], **event[1])
        except PermissionError as error:
            raise UsageError(f"{self.path}: you may not change it (permission denied)") from error
        return changed

    def event(self, kind: str, /, **details: Any) -> None:
        """Appends to events.jsonl: `{"time": …, "event": kind, …details}`; no secret of this environment."""
        shown = {key: hide(value) if isinstance(value, str) else value for key, value in details.items()}
        append_line(self.events_file, {"time": now(), "event": kind, **shown})

    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first."""
        return read_lines(self.events_file)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl, oldest first."""
        return read_lines(self.metrics_file)

    def step(self) -> int:
        """The last step that was logged; 0 before the first."""
        last = last_line(self.metrics_file, having="loss")
        return int(last["step"]) if last else 0

    def last_sign(self) -> str | None:
        """When the run's own processes wrote something last (UTC, ISO 8601); None before they have."""
        times = []
        for file in (self.metrics_file, self.events_file):
            with contextlib.suppress(OSError):
                times.append(file.stat().st_mtime)
        return datetime.fromtimestamp(max(times), UTC).isoformat(timespec="milliseconds") if times else None

    @property
    def runs_dir(self) -> Path:
        """The folder of all runs that this one lies in."""
        return self.path.parent.parent


def _read_replaced(path: Path, tries: int = 5) -> str:
    """The text of a file that others replace: NFS calls a handle stale when the old file is gone."""
    for _ in range(tries - 1):
        try:
            return read_text(path)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return read_text(path)


def parse_state(plain: Mapping[str, Any], source: Path) -> RunState:
    """A state from its JSON: keys that this version doesn't know are ignored, missing ones get their default.

    Raises:
        UsageError: a key without a default is missing.
    """
    values = {key: value for key, value in plain.items() if key in _FIELDS}
    if lacking := [name for name in _NEEDED if name not in values]:
        raise UsageError(f"{source}: not a state file that hpcdl wrote (without {', '.join(lacking)})")
    values = {**_STAND_INS, **values, "node_list": tuple(values.get("node_list") or ())}
    _refuse_what_does_not_fit(values, source)
    if values["state"] not in _STATES:
        values["reason"] = f"state.json says {values['state']!r}, which this version of hpcdl doesn't know"
        values["state"] = "UNKNOWN"
    return RunState(**values)


_STAND_INS: dict[str, Any] = {"kind": "local", "nodes": 1, "world_size": 1, "max_steps": 0, "created": ""}
"""For keys that an older version may not have written."""
_FIELDS = frozenset(field.name for field in dataclasses.fields(RunState))
_NEEDED = tuple(
    field.name
    for field in dataclasses.fields(RunState)
    if field.default is dataclasses.MISSING and field.name not in _STAND_INS
)
_STATES = frozenset(get_args(State))
_PLAIN: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "None": (type(None),)}
_TYPES = {
    field.name: tuple(kind for part in str(field.type).split(" | ") for kind in _PLAIN.get(part, (str,)))
    for field in dataclasses.fields(RunState)
    if field.name != "node_list"
}
_JOB = re.compile(r"\d+(_\d+)?|[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
"""A job of Slurm's, or one of Kubernetes'."""
_NAMES = {
    "job_id": _JOB,
    "submission": re.compile(r"\w[\w.-]*"),
    "running_try": re.compile(r"[\d.]*"),
}
"""What becomes an argument of Slurm's commands, or a part of a path."""


def _refuse_what_does_not_fit(values: Mapping[str, Any], source: Path) -> None:
    """Somebody else may have written the file: what it says is looked at before anything is done with it."""
    for name, kinds in _TYPES.items():
        if name in values and type(values[name]) not in kinds:
            raise UsageError(f"{source}: not a state file that hpcdl wrote ({name} is {values[name]!r})")
    for name, pattern in _NAMES.items():
        if values.get(name) and not pattern.fullmatch(values[name]):
            raise UsageError(f"{source}: not a state file that hpcdl wrote ({name} is {values[name]!r})")
    if not all(isinstance(node, str) for node in values["node_list"]):
        raise UsageError(f"{source}: not a state file that hpcdl wrote (node_list)")


def read_submission(runs_dir: Path, token: str, file: str = "submission.json") -> dict[str, Any]:
    """The record of one submission: `{token, job_id, kind, name, created, …}`; empty if it isn't there."""
    try:
        record = json.loads(read_text(runs_dir / SUBMISSIONS / token / file))
    except (OSError, json.JSONDecodeError):
        return {}
    if not isinstance(record, dict) or not _JOB.fullmatch(str(record.get("job_id") or 0)):
        return {}  # somebody else may have written it
    return dict(record)


def decide_job(runs_dir: Path, token: str, job_id: str) -> str:
    """Which job is the submission's: `job_id`, unless another one was written down before.

    sbatch may have been run twice when its first answer was lost. Whoever comes first, the launcher, a look or
    the job itself, decides; a second job has nothing to do.

    Args:
        runs_dir: the folder of all runs.
        token: names the submission.
        job_id: a job or array, without a task.
    """
    known = read_submission(runs_dir, token).get("job_id")
    if known is not None:
        return str(known)
    with _changing(runs_dir, token) as record:
        if record.get("job_id") is None:
            record["job_id"] = job_id
        return str(record["job_id"])


def note(runs_dir: Path, token: str, **more: Any) -> None:
    """Adds to the record of a submission what is known now, and changes nothing else."""
    with _changing(runs_dir, token) as record:
        record.update(more)


@contextlib.contextmanager
def _changing(runs_dir: Path, token: str) -> Iterator[dict[str, Any]]:
    folder = runs_dir / SUBMISSIONS / token
    with locked(folder / ".job.lock"):
        record = read_submission(runs_dir, token)
        before = dict(record)
        yield record
        if record != before:
            write_json(folder / "submission.json", record)


def all_runs(runs_dir: Path) -> Iterator[RunDir]:
    """Every folder below `runs_dir` that may be a run's, in no order; none where it isn't there yet.

    Whether there is a state in it is told by reading it, as `hpcdl.runs.reconcile.read` does: one look at the disk a
    run, and no second.

    Raises:
        UsageError: `runs_dir` itself can't be read. A folder in it that can't is left out.
    """
    try:
        names = [
            e for e in os.scandir(runs_dir) if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)
        ]
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{runs_dir}: can't be read ({error.strerror})") from error
    for name in names:
        yield from runs_called(Path(name.path))


def runs_called(folder: Path) -> Iterator[RunDir]:
    """Every folder of one experiment's (`<runs_dir>/<name>`) that may be a run's; none where it can't be read."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield RunDir(folder / entry.name)


def runs_of(runs_dir: Path, token: str) -> list[RunDir]:
    """The runs that a submission was made for, in the order of its tasks; none where nobody can say.

    By their names: the folder of all runs may have been moved since.
    """
    try:
        lines = read_text(runs_dir / SUBMISSIONS / token / "runs.txt").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    names = [(path.parent.name, path.name) for path in map(Path, lines)]
    return [RunDir(runs_dir / name / run_id) for name, run_id in names if not {"", ".."} & {name, run_id}]
