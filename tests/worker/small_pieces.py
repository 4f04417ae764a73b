"""A worker whose streamed model passes through in pieces of a few rows, as only a large model's would.

Without a garbage collector: what a piece leaves in a cycle would stay until the end.
"""

from __future__ import annotations

import gc
import os
from typing import Any

from hpcdl.distributed import residence, slices, stream
from hpcdl.runs.store import RunDir
from hpcdl.worker import main as worker


def main(run: RunDir) -> None:
    rows = int(os.environ["TEST_ROWS"])
    slices.SLICE, slices.CHUNK_LOGITS, stream.PIECE = 3 * rows, 200 * rows, rows
    if os.environ.get("TEST_COPIES"):  # as on a GPU, whose memory the weights are copied to
        init = residence.Residence.__init__

        def copying(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            self.copies = True

        residence.Residence.__init__ = copying  # type: ignore[method-assign]
        residence.Residence._copy = lambda self, tensor: tensor.clone()  # type: ignore[method-assign]
    gc.disable()
    worker.main(run)
