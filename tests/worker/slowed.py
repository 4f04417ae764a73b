"""A worker one rank of which is slow: `SLOW=<rank>:<where>:<seconds>`, where `where` is forward or data.

It is looked at often and in single steps, so that tests are short.
"""

from __future__ import annotations

import os
import time
from typing import Any

from hpcdl.runs.store import RunDir
from hpcdl.worker import waiting
from hpcdl.worker.data.loader import Loader

waiting.LOOK_S, waiting.SHARE = 0.0, 1.0


def main(run: RunDir) -> None:
    """In the forked process."""
    from hpcdl.distributed.decoder import Stage
    from hpcdl.worker.main import main as work

    rank, where, seconds = os.environ.get("SLOW", "-1::0").split(":")
    if os.environ["RANK"] == rank:
        owner: Any = {"forward": Stage, "data": Loader}[where]
        name = {"forward": "forward", "data": "micro_batches"}[where]
        before = getattr(owner, name)

        def late(*args: Any, **kwargs: Any) -> Any:
            time.sleep(float(seconds))
            return before(*args, **kwargs)

        setattr(owner, name, late)
    work(run)
