"""`python -m hpcdl.launch.waiting RUNS_FILE`: a local run's shell waits here for the runs that come first.

Under Slurm the queue does this. Ends with 0 when all of them are COMPLETED; else the runs that have waited are
CANCELLED, with the name of the one that has failed, and the shell ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hpcdl.launch import begin
from hpcdl.runs import parents, wish
from hpcdl.runs.store import RunDir

POLL_S = 1.0


def main(argv: Sequence[str]) -> int:
    """Waits; returns 0, or the exit code of runs that are not to start."""
    folder = Path(argv[0]).parent
    lines = Path(argv[0]).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    runs = [RunDir(Path(line)) for line in lines]
    awaited = parents.of_submission(folder.parent.parent, folder.name)
    said, looks = "", begin.Looks()
    while left := parents.unfinished(awaited):
        looks.at(left)
        if why := parents.failed(left):
            return _cancel(runs, folder.name, why, by="dependency")
        if all(wish.of(run) for run in runs):
            return _cancel(runs, folder.name, "cancelled while it waited", by="cancel")
        if (waits := parents.waits_for(left)) != said:
            _say(runs, folder.name, waits)
            said = waits
        time.sleep(POLL_S)
    _say(runs, folder.name, "")
    return 0


def _say(runs: Sequence[RunDir], token: str, reason: str) -> None:
    for run in runs:
        state = run.read_state()
        if state.state == "PENDING" and state.submission == token:
            run.update(expect=state, reason=reason)


def _cancel(runs: Sequence[RunDir], token: str, why: str, *, by: str) -> int:
    return max(begin.cancel(run, token, why, by=by) for run in runs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
