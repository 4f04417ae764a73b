"""A worker whose streamed model passes through in pieces of a few rows, as only a large model's would.

Without a garbage collector: what a piece leaves in a cycle would stay until the end.
"""

from __future__ import annotations

import gc
import os

from hpcdl.distributed import slices, stream
from hpcdl.runs.store import RunDir
from hpcdl.worker import main as worker


def main(run: RunDir) -> None:
    rows = int(os.environ["TEST_ROWS"])
    slices.SLICE, slices.CHUNK_LOGITS, stream.PIECE = 3 * rows, 200 * rows, rows
    gc.disable()
    worker.main(run)
