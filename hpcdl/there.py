"""What a laptop starts on a login node over ssh (hpcdl.launch.remote): a launch that was composed there, or a command.

It is the laptop's own hpcdl, carried here. Standard input is the laptop's hand on us: a command ends when it lets go; a
launch goes on, so that a cut connection leaves no half of a submission.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import gzip
import io
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcdl.cli import guarded
from hpcdl.launch.remote.envelope import ANSWER

KEPT_S = 7 * 86400
"""How long the answer to a launch with `force=true` is kept, in case that it got lost."""
GRACE_S = 5.0
"""For a command to end by itself when nobody listens any more."""
ROWS = 500
"""Of states that a laptop keeps for when it can't ask."""


def main(argv: Sequence[str]) -> int:
    """`launch`, with a request on standard input; or `verb` and what it is, as JSON."""
    if argv[0] == "launch":
        return _launch()
    return _verb(json.loads(argv[1]))


def _launch() -> int:
    """Does what a launch here does after composing; answers with its text, its exit code and its runs."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):  # cut off: nobody knows what was wanted
        return 3
    request = json.loads(gzip.decompress(base64.b64decode(line)))
    from hpcdl.launch import code

    code.take(request["snapshot"])
    folder = Path(request["points"][0]["plain"]["runs_dir"])
    os.environ["HPCDL_RUNS"] = str(folder)
    answer = _launched(request) if request["ask"] is None else _launched_once(request, folder)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(answer.pop("text") + ANSWER + json.dumps(answer))
        sys.stdout.flush()
        return 0
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _launched(request: Mapping[str, Any], again: _Again | None = None) -> dict[str, Any]:
    """The answer to a request."""
    from hpcdl.launch import __main__ as launch
    from hpcdl.launch import points
    from hpcdl.launch.compose import Composed, Composer
    from hpcdl.launch.sweep import Draft, Drafts, Point
    from hpcdl.spec import LaunchOptions

    drafts = tuple(
        Draft(label=one["label"], composed=Composed(plain=one["plain"]), typed=frozenset(one["typed"]))
        for one in request["points"]
    )
    seen: list[points.Planned] = []

    def plan(asked: Sequence[Point], options: LaunchOptions) -> list[points.Planned]:
        seen[:] = points.plan(asked, options) if again is None else again.plan(asked, options)
        return seen

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = guarded(lambda: launch.go_on(Drafts(drafts=drafts, elsewhere=True), Composer(), plan))
    runs = [] if request["points"][0]["plain"]["dry_run"] else [_known(item) for item in seen]
    return {"text": text.getvalue(), "code": code, "runs": [run for run in runs if run is not None]}


def _known(item: Any) -> dict[str, Any] | None:
    """What the laptop writes down of a run; None where it was not made."""
    run = item.run
    try:
        state = run.read_state()
    except OSError:
        return None
    sweep = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        sweep = json.loads((run.path / "sweep.json").read_text(encoding="utf-8"))["sweep"]
    return {
        "run_id": state.run_id,
        "name": state.name,
        "run_dir": str(run.path),
        "job_id": state.job_id,
        "sweep": sweep,
        "submitted": state.created,
    }


def _launched_once(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The answer to a request that would make new runs each time: asked again it makes none."""
    from hpcdl.runs.files import locked, write_json

    asked = folder / ".asked"
    asked.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in asked.iterdir():
        if time.time() - old.stat().st_mtime > KEPT_S:
            old.unlink(missing_ok=True)
    file = asked / f"{request['ask']}.json"
    with locked(file.with_suffix(".lock")):
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if "answer" in record:
            return dict(record["answer"])
        answer = _launched(request, _Again(file, record.get("runs", {})))
        write_json(file, {**_read(file), "answer": answer})
        return answer


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


class _Again:
    """Plans a launch with `force=true` that may have been begun before: runs that it made then are taken up.

    Args:
        file: where is written which runs it makes, before it makes them.
        before: those of the time before, by the point's digest.
    """

    def __init__(self, file: Path, before: Mapping[str, str]) -> None:
        self._file = file
        self._before = {key: Path(path) for key, path in before.items()}

    def plan(self, asked: Sequence[Any], options: Any) -> list[Any]:
        """As hpcdl.launch.points has it."""
        import dataclasses

        from hpcdl.launch import points
        from hpcdl.runs.files import write_json

        made = [point for point in asked if self._is_made(point)]
        rest = [point for point in asked if not self._is_made(point)]
        planned = points.plan(made, dataclasses.replace(options, force=False)) if made else []
        planned += points.plan(rest, options) if rest else []
        runs = {key: str(path) for key, path in self._before.items()}
        runs |= {f"{item.spec.name}/{item.run.path.name[:12]}": str(item.run.path) for item in planned}
        write_json(self._file, {"runs": runs})
        return planned

    def _is_made(self, point: Any) -> bool:
        path = self._before.get(f"{point.spec.name}/{point.run_id}")
        return path is not None and (path / "state.json").exists()


def _verb(asked: Mapping[str, Any]) -> int:
    """A command of hpcdl's, done here for the laptop that it was typed on."""
    from hpcdl import verbs

    folder = str(asked["folder"])
    os.environ.update(asked.get("terminal", {}), HPCDL_RUNS=folder)
    options = argparse.Namespace(**{**asked["options"], "runs_dir": folder})
    if not sys.stdin.isatty():
        threading.Thread(target=_watch, daemon=True).start()
    key = asked.get("file")
    made = Path(tempfile.mkdtemp(prefix="hpcdl-")) if key else None
    if key and made:
        setattr(options, key, str(made / asked["file_name"]) if asked["file_name"] else f"{made}{os.sep}")
    code = guarded(lambda: verbs.get(asked["verb"]).run(options))
    if asked.get("answer"):
        record = {"rows": _rows(asked, Path(folder)), "made": str(made) if made else None}
        sys.stdout.write(ANSWER + json.dumps(record))
        sys.stdout.flush()
    return code


def _rows(asked: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """How the runs stand, for when the laptop can't ask."""
    from hpcdl.runs import query, status
    from hpcdl.runs.reconcile import read
    from hpcdl.runs.store import all_runs

    if asked["verb"] != "status":
        return []
    words = asked["options"]["runs"]
    reading = query.read_all(words, folder) if words else read(all_runs(folder))
    views = sorted(reading.views, key=lambda view: view.state.created, reverse=True)
    return [status.as_json(view) for view in views[:ROWS]]


def _watch() -> None:
    """Ends this process when the laptop has let go."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE_S)
    os._exit(130)
