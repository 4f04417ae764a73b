"""What a forked worker of benchmarks/planner.py runs: hpcdl's own, and then a look at the whole process's memory."""

from __future__ import annotations

import os

from hpcdl.runs.files import write_json
from hpcdl.runs.store import RunDir


def main(run: RunDir) -> None:
    """Trains to the end; leaves process-rankN.json. With $PLANNER_NO_RESULT there is no result: it takes seconds."""
    from hpcdl.worker import main as worker
    from hpcdl.worker import training
    from hpcdl.worker.memory import resident
    from hpcdl.worker.metrics import resident_peak_bytes

    before = resident()["now"]  # of what was forked: libraries, and nothing of a model
    if os.environ.get("PLANNER_NO_RESULT"):
        training.finish = lambda *_: None
    worker.main(run)
    record = {"rss_peak": resident_peak_bytes(), "before": before}
    write_json(run.path / f"process-rank{os.environ['RANK']}.json", record)
