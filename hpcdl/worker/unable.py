"""A worker that can't even import what it is made of: its last words, by the standard library alone."""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import UTC, datetime
from typing import NoReturn

NEVER_RESTART = 78
CAUSE = "hpcdl: cause: "
"""As hpcdl.runs.kinds has them, which may be what can't be imported; a test compares them."""


def leave(error: BaseException) -> NoReturn:
    """Says why over the worker's output, where its agent reads it, and ends the process."""
    record = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "node": os.environ.get("SLURMD_NODENAME") or os.uname().nodename.split(".")[0],
        "rank": int(os.environ.get("RANK", "0")),
        "type": type(error).__name__,
        "message": str(error),
        "kind": "fault",
    }
    traceback.print_exception(error)
    print(f"{CAUSE}{json.dumps(record)}", file=sys.stderr, flush=True)
    os._exit(NEVER_RESTART)
