"""Claims runs, writes their directories, submits them; killed at any line, the next launch goes on sanely.

In this order, for each submission, under its lock:

1. claim: a new run's directory is written whole in a corner and renamed to its place, which fails where
   somebody has been quicker; a run that is taken up again changes from its old state to PENDING, if its old
   state still stands. Either way one launcher wins.
2. `runs.txt`, `job.sh`, `submission.json` without a job id but with this launcher's process.
3. submit.
4. `submission.json` with the job id.

Killed between 1 and 3: PENDING runs without a job whose launcher is dead; the next look calls them FAILED, and
launching again submits them. Killed between 3 and 4: the job is found in the queue by its comment, which
holds the token, by the name of its output file, or has spoken for itself. Where Slurm doesn't answer, the runs
stay PENDING without a job until it does (hpcdl.launch.lost).
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcdl.errors import SchedulerError, UsageError
from hpcdl.launch import backends, code, frozen, lost
from hpcdl.launch.base import JobRequest
from hpcdl.launch.child import started_at
from hpcdl.launch.points import Batch, Planned
from hpcdl.launch.spec_text import SpecTexts
from hpcdl.launch.sweep import Refused
from hpcdl.runs import contact, parents, private
from hpcdl.runs.files import locked, write_atomic, write_json
from hpcdl.runs.query import SWEEPS
from hpcdl.runs.state import RunState
from hpcdl.runs.store import RunDir, decide_job, note, now, read_submission

FEW = 8
"""Up to so many runs each file is synced by itself; above, the disk is synced once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """What became of one submission."""

    runs: tuple[Planned, ...]
    """The runs that it carries: those which this launcher was the first to claim."""
    job_id: str | None
    refused: str = ""
    """The scheduler's words, where it refused or wasn't there."""


def submit(batch: Batch, sweep: str | None) -> Submitted:
    """Claims and submits; the runs' states say what happened."""
    for number in itertools.count(1):
        token = batch.request.token if number == 1 else f"{batch.request.token}-{number}"
        request = dataclasses.replace(batch.request, token=token)
        _make_folder(request)
        with locked(request.folder / ".lock"):
            if not any(_is_open(item) for item in batch.runs):
                return Submitted(runs=(), job_id=None)  # somebody was quicker with all of them
            if read_submission(request.runs_dir, token).get("job_id") is not None:
                continue  # an earlier job's, whose run directories were deleted: it must not run these
            return _submit(request, batch.runs, sweep)
    raise AssertionError("unreachable")


def _make_folder(request: JobRequest) -> None:
    """The submission's own folder: its name can be foretold, and what it holds is executed.

    Raises:
        UsageError: it is somebody else's, or can't be made.
    """
    try:
        request.folder.mkdir(parents=True, exist_ok=True)
    except PermissionError as error:
        raise UsageError(
            f"{error.filename}: you may not write here ({error.strerror})\nfix: runs_dir=… of your own"
        ) from error
    private.require_mine(request.folder)


def _is_open(item: Planned) -> bool:
    """Whether the run still stands as it did when the launch was planned."""
    if item.view is None:
        return not item.run.state_file.exists()
    return item.run.read_state() == item.view.state


def _submit(request: JobRequest, runs: Sequence[Planned], sweep: str | None) -> Submitted:
    if request.code is not None:
        frozen.write(request.code)
    # Whoever looks meanwhile finds out from here whether the launcher still lives.
    _record(request, job_id=None)
    mine = _claim(request, runs, sweep)
    if not mine:
        return Submitted(runs=(), job_id=None)
    request = dataclasses.replace(request, run_dirs=tuple(item.run.path for item in mine))
    text = _write(request, mine)
    try:
        job_id = backends.get(request.cluster.kind).submit(request, text)
    except lost.Unanswered as error:  # the runs stay as they are: the job may be there, and is found later
        note(request.runs_dir, request.token, unanswered=str(error))
        return Submitted(runs=mine, job_id=None, refused=str(error))
    except KeyboardInterrupt:
        print(f"\nhpcdl: {lost.INTERRUPTED}", file=sys.stderr, flush=True)
        raise
    except SchedulerError as error:
        _give_up(request, mine, str(error))
        return Submitted(runs=mine, job_id=None, refused=str(error))
    except Exception as error:  # a bug of ours: runs must not seem to wait for a job that isn't there
        _give_up(request, mine, f"{type(error).__name__}: {error}")
        raise
    if job_id is not None:
        job_id = decide_job(request.runs_dir, request.token, job_id)
        contact.answered(request.runs_dir, request.cluster.kind)
    _link_latest(request.runs_dir, mine[-1].run)
    return Submitted(runs=mine, job_id=job_id)


def adopt(batch: Batch, job_id: str) -> Path:
    """Claims one run for a job that was submitted by hand and runs already; returns the job's runs file.

    Raises:
        UsageError: somebody else was quicker with the run.
    """
    request = batch.request
    _make_folder(request)
    with locked(request.folder / ".lock"):
        _record(request, job_id=None)
        mine = _claim(request, batch.runs, None)
        if not mine:
            raise UsageError(f"{batch.runs[0].run.path}: another launch has taken this run meanwhile")
        _write(request, mine)
        _record(request, job_id=job_id.partition("_")[0])
        mine[0].run.update(job_id=job_id)
        _link_latest(request.runs_dir, mine[0].run)
    return request.folder / "runs.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What every run of a submission is claimed with."""

    request: JobRequest
    sweep: str | None
    corner: Path
    """Where a new run's directory is written before it gets its place."""
    durable: bool
    """Whether each file is synced by itself."""
    texts: SpecTexts


def _claim(request: JobRequest, runs: Sequence[Planned], sweep: str | None) -> tuple[Planned, ...]:
    """The runs that nobody else has claimed meanwhile; their index in the array is their place here."""
    corner = request.folder / "new"
    shutil.rmtree(corner, ignore_errors=True)  # of a launcher that was killed here
    corner.mkdir()
    durable = len(runs) <= FEW
    claim = Claim(request=request, sweep=sweep, corner=corner, durable=durable, texts=SpecTexts())
    mine: list[Planned] = []
    for item in runs:
        if (_claim_new if item.action == "new" else _claim_again)(item, claim, len(mine)):
            mine.append(item)
    corner.rmdir()
    if not durable:
        os.sync()
    return tuple(mine)


def _claim_new(item: Planned, claim: Claim, index: int) -> bool:
    draft = RunDir(claim.corner / item.run.path.name)
    draft.path.mkdir()
    write_atomic(draft.spec_file, claim.texts.text(item.spec, item.notes), durable=claim.durable)
    if claim.sweep is not None:
        write_json(draft.path / "sweep.json", {"sweep": claim.sweep}, durable=False)
    draft.write_state(first_state(item, claim.request, index), durable=claim.durable)
    draft.event("submitted", attempt=0, submission=claim.request.token, **item.recorded)
    try:
        item.run.path.parent.mkdir(parents=True, exist_ok=True)
        draft.path.rename(item.run.path)
    except PermissionError as error:
        raise UsageError(
            f"{item.run.path.parent} belongs to {private.owner(item.run.path.parent)}, and you may not write in it\n"
            "fix: another name=…, or runs_dir=… of your own"
        ) from error
    except OSError as error:
        if item.run.state_file.exists():
            shutil.rmtree(draft.path)
            return False
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UsageError(
            f"{item.run.path} is there already and is no run: it has no {item.run.state_file.name}\n"
            "fix: move it away, or another name=… or runs_dir=…"
        ) from error
    return True


def first_state(item: Planned, request: JobRequest, index: int) -> RunState:
    """The state of a run that nobody has seen yet."""
    spec = item.spec
    return RunState(
        run_id=item.run.path.name,
        name=spec.name,
        state="PENDING",
        kind=spec.cluster.kind,
        submission=request.token,
        array_index=index,
        nodes=spec.cluster.nodes,
        world_size=spec.cluster.world_size,
        max_steps=spec.trainer.max_steps,
        created=now(),
    )


def _claim_again(item: Planned, claim: Claim, index: int) -> bool:
    assert item.view is not None
    private.require_mine(item.run.path)
    request = claim.request
    claimed = item.run.update(
        expect=item.view.state,
        event=("submitted", {"attempt": item.attempt, "submission": request.token, **item.recorded}),
        state="PENDING",
        reason="",
        kind=item.spec.cluster.kind,
        job_id=None,
        submission=request.token,
        array_index=index,
        attempt=item.attempt,
        node_list=(),
        host=None,
        agent_pid=None,
        agent_started=None,
        exit_code=None,
        ended=None,
    )
    if claimed.submission != request.token or claimed.array_index != index:
        return False
    # What the cluster is asked for may have changed: it is no part of the run's identity.
    write_atomic(item.run.spec_file, claim.texts.text(item.spec, item.notes), durable=claim.durable)
    item.run.stop_file.unlink(missing_ok=True)
    if claim.sweep is not None:
        write_json(item.run.path / "sweep.json", {"sweep": claim.sweep}, durable=False)
    return True


def _write(request: JobRequest, mine: Sequence[Planned]) -> str:
    """The submission's files; each run gets the script as a second name of the same file."""
    text = backends.get(request.cluster.kind).render(request)
    if request.parents:
        parents.write(request.folder, request.parents)
    write_atomic(request.folder / "runs.txt", "".join(f"{item.run.path}\n" for item in mine))
    script = request.folder / "job.sh"
    write_atomic(script, text)
    snapshot = code.snapshot()
    code.keep(snapshot, request.folder)
    for item in mine:
        code.give(snapshot, request.folder, item.run.path)
        try:
            item.run.job_file.unlink(missing_ok=True)
            os.link(script, item.run.job_file)
        except OSError:  # a file system without hard links
            write_atomic(item.run.job_file, text, durable=False)
    return text


def _record(request: JobRequest, *, job_id: str | None, **more: str) -> None:
    """submission.json: who launches, and what the scheduler said."""
    record = {
        "token": request.token,
        "job_id": job_id,
        "kind": request.cluster.kind,
        "name": request.name,
        "created": now(),
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "pid_started": started_at(os.getpid()),
        **more,
    }
    write_json(request.folder / "submission.json", record)


def _give_up(request: JobRequest, mine: Sequence[Planned], words: str) -> None:
    """The scheduler has refused: the runs say so, and the next launch submits them anew."""
    for item in mine:
        state = item.run.read_state()
        if state.submission == request.token and state.state == "PENDING":
            event = ("failed", {"reason": words, "traceback": ""})
            item.run.update(expect=state, event=event, state="FAILED", reason=words, ended=now())
    _record(request, job_id=None, refused=words)


def _link_latest(runs_dir: Path, run: RunDir) -> None:
    """`<runs_dir>/latest` → the run launched last; replaced in one step."""
    link = runs_dir / f".latest.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(run.path.relative_to(runs_dir))
    link.replace(runs_dir / "latest")


def record_sweep(planned: Sequence[Planned], refused: Sequence[Refused]) -> str:
    """`<runs_dir>/.sweeps/<sweep>.json`: which point is which run, and which can't be; returns the sweep's id.

    The id follows from the points, so that the same sweep has the same.
    """
    content = [*(str(item.run.path) for item in planned), *(item.label for item in refused)]
    sweep = "sweep-" + hashlib.sha256("\n".join(content).encode()).hexdigest()[:8]
    record = {
        "sweep": sweep,
        "name": planned[0].spec.name,
        "created": now(),
        "points": [
            {"overrides": label, "run_id": item.run.path.name, "run_dir": str(item.run.path)}
            for item in planned
            for label in item.labels
        ],
        "refused": [
            {
                "overrides": item.label,
                "reason": item.reason,
                "faults": [dataclasses.asdict(fault) for fault in item.faults],
            }
            for item in refused
        ],
    }
    folder = planned[0].run.runs_dir / SWEEPS
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{sweep}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return sweep
