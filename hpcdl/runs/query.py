"""Finding runs by what people have at hand: an id, a job id, a directory, a name, a sweep, `latest`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hpcdl.errors import UsageError, nearest_name
from hpcdl.runs import chain, many
from hpcdl.runs.reconcile import Reading, View, read
from hpcdl.runs.store import SUBMISSIONS, RunDir, all_runs, read_submission, runs_called, runs_of

SWEEPS = ".sweeps"
_JOB_ID = re.compile(r"(\d+)(?:_(\d+))?")
SHOWN = 8
"""Candidates that a message lists."""


def runs_dir(option: str | None = None) -> Path:
    """The folder of all runs: `option`, else $HPCDL_RUNS, else `runs`; absolute."""
    return Path(option or os.environ.get("HPCDL_RUNS") or "runs").absolute()


def find(query: str, folder: Path, seen: dict[RunDir, View] | None = None) -> list[RunDir]:
    """The runs that `query` names, oldest first.

    In this order: `latest`, a run's directory, a run id, a job id (an array's own id: all its tasks), an
    experiment's name (all its runs), a sweep's id (all its points, in order), the beginning of a run id.

    Args:
        query: what the user typed.
        folder: the folder of all runs.
        seen: takes the states that had to be read for it.

    Raises:
        UsageError: nothing has that name, or the beginning of a run id fits several.
    """
    seen = {} if seen is None else seen
    if query == "latest":
        return [_latest(folder)]
    at_path = _by_path(query)
    if at_path is not None:
        return [at_path]
    if _is_name(query):
        by_id = [RunDir(path) for path in folder.glob(f"[!.]*/{query}") if (path / "state.json").exists()]
        if by_id:
            return by_id
    return (
        _by_job(query, folder, seen)
        or _by_name(query, folder, seen)
        or _by_sweep(query, folder)
        or _by_prefix(query, folder)
    )


def find_all(queries: Sequence[str], folder: Path) -> list[RunDir]:
    """The runs that any of `queries` names, each once."""
    return list(dict.fromkeys(run for query in queries for run in find(query, folder)))


def read_all(queries: Sequence[str], folder: Path) -> Reading:
    """The runs that any of `queries` names, each once, and their states; no state is read twice."""
    seen: dict[RunDir, View] = {}
    runs = dict.fromkeys(run for query in queries for run in find(query, folder, seen))
    return read(runs, seen)


def find_one(query: str, folder: Path) -> RunDir:
    """The run that `query` names; the newest, where it names several (an experiment with several runs).

    Raises:
        UsageError: nothing has that name; or it is an array's or a sweep's, of which none is the newest.
    """
    runs = find(query, folder)
    if len(runs) == 1:
        return runs[0]
    if _is_name(query) and (folder / query).is_dir():
        return runs[-1]
    raise UsageError(f"{query} is {len(runs)} runs; name one of them:\n{_list(runs)}")


def by_age(runs: Iterable[RunDir]) -> list[View]:
    """Readable runs, the oldest first."""
    return sorted(read(runs).views, key=lambda view: (view.state.created, view.state.run_id))


def _latest(folder: Path) -> RunDir:
    path = (folder / "latest").resolve()
    if not (path / "state.json").exists():
        views = by_age(all_runs(folder))
        if not views:
            raise UsageError(f"no run yet in {folder} (--runs-dir or $HPCDL_RUNS names another folder)")
        return views[-1].run
    return RunDir(path)


def _by_path(query: str) -> RunDir | None:
    path = Path(query)
    if os.sep not in query and not path.is_dir():
        return None
    if (path / "state.json").exists():
        return RunDir(path.resolve())
    if os.sep in query:
        raise UsageError(f"{query} is no run's directory: there is no state.json in it")
    return None


def _by_job(query: str, folder: Path, seen: dict[RunDir, View]) -> list[RunDir]:
    found = _JOB_ID.fullmatch(query)
    if found is None:
        return []
    # Its submission names its runs. Not every job has one (sbatch by hand): those are found in the runs' states.
    for runs in (_submitted_in(found.group(1), folder), all_runs(folder)):
        if of_job := _of_job(query, folder, views := by_age(runs)):
            seen.update((view.run, view) for view in views)
            return of_job
    return []


def _submitted_in(job: str, folder: Path) -> list[RunDir]:
    """The runs of the submissions that are this job."""
    try:
        tokens = [entry.name for entry in os.scandir(folder / SUBMISSIONS)]
    except OSError:
        return []
    records = many.each(lambda token: (token, read_submission(folder, token)), tokens)
    lists = [runs_of(folder, token) for token, record in records if str(record.get("job_id")) == job]
    return list(dict.fromkeys(run for runs in lists for run in runs))


def _of_job(query: str, folder: Path, views: Iterable[View]) -> list[RunDir]:
    """Of these runs the job's; of an array's its tasks in order."""
    # A run may have gone on in another job since (hpcdl.runs.chain): it is still found by its earlier ones.
    earlier = cache(lambda token: tuple(chain.earlier_jobs(folder, token)))
    jobs: list[tuple[str, RunDir]] = []
    for view in views:
        own = [view.state.job_id] if view.state.job_id else []
        for job_id in (*own, *earlier(view.state.submission)):
            jobs.append((job_id, view.run))
    exact = [run for job_id, run in jobs if job_id == query]
    if exact or "_" in query:
        return list(dict.fromkeys(exact))
    tasks = [(job_id, run) for job_id, run in jobs if job_id.partition("_")[0] == query]
    return list(
        dict.fromkeys(run for _, run in sorted(tasks, key=lambda one: int(one[0].partition("_")[2] or 0)))
    )


def _by_name(query: str, folder: Path, seen: dict[RunDir, View]) -> list[RunDir]:
    if not _is_name(query) or not (folder / query).is_dir():
        return []
    views = by_age(runs_called(folder / query))
    seen.update((view.run, view) for view in views)
    return [view.run for view in views]


def read_sweep(query: str, folder: Path) -> dict[str, Any] | None:
    """The record of a sweep, `{sweep, name, created, points, refused}`; None where `query` is no sweep's id.

    Raises:
        UsageError: the record can't be read.
    """
    file = folder / SWEEPS / f"{query}.json"
    if not _is_name(query) or not file.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        points = [{**point, "run_id": str(point["run_id"])} for point in record["points"]]
        return {"refused": [], **record, "points": points}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file}: not a sweep that hpcdl wrote ({error!r})") from error


def _by_sweep(query: str, folder: Path) -> list[RunDir]:
    record = read_sweep(query, folder)
    if record is None:
        return []
    ids = [point["run_id"] for point in record["points"]]
    known = {run.path.name: run for run in all_runs(folder)}
    return [known[run_id] for run_id in dict.fromkeys(ids) if run_id in known]


def _by_prefix(query: str, folder: Path) -> list[RunDir]:
    runs = list(all_runs(folder))
    fitting = [run for run in runs if query and run.path.name.startswith(query) and run.state_file.exists()]
    if len(fitting) == 1:
        return fitting
    if fitting:
        raise UsageError(f"{query} is the beginning of {len(fitting)} run ids:\n{_list(fitting)}")
    raise _not_found(query, folder, runs)


def _not_found(query: str, folder: Path, runs: Sequence[RunDir]) -> UsageError:
    if not folder.is_dir():
        where = f"there is no folder {folder}"
    else:
        where = f"looked in {folder}, which has {len(runs)} run{'s' if len(runs) != 1 else ''}"
    names = {run.path.name for run in runs} | {run.path.parent.name for run in runs} | {"latest"}
    nearest = nearest_name(query, names) if runs else ""
    lines = [f"no run is called {query}: {where}"]
    if nearest:
        lines.append(f"nearest name: {nearest}")
    lines.append(
        "a run id, its beginning, a job id, a run's directory, an experiment's name or `latest` will do;"
    )
    lines.append("--runs-dir or $HPCDL_RUNS names another folder")
    return UsageError("\n".join(lines))


def _list(runs: Sequence[RunDir]) -> str:
    shown = [f"  {run.path.name}  {run.path.parent.name}" for run in runs[:SHOWN]]
    more = len(runs) - SHOWN
    return "\n".join(shown + ([f"  … and {more} more"] if more > 0 else []))


def _is_name(query: str) -> bool:
    """Whether `query` can be a folder's name (and no pattern that would find something else)."""
    return re.fullmatch(r"[\w.+=,@-]+", query) is not None and not query.startswith(".")
