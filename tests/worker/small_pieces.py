"""A worker whose streamed model passes through in pieces of a few rows, as only a large model's would."""

from __future__ import annotations

from hpcdl.distributed import slices, stream
from hpcdl.runs.store import RunDir
from hpcdl.worker import main as worker


def main(run: RunDir) -> None:
    slices.SLICE, slices.CHUNK_LOGITS, stream.PIECE = 32 * 100, 7000, 32 * 30
    worker.main(run)
