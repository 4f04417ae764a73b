"""What a node must have before torchrun is worth starting: a run directory that can be read and written."""

from __future__ import annotations

import os
import shutil

from hpcdl.errors import RunFailedError
from hpcdl.runs.store import RunDir

MIN_FREE_BYTES = 64 * 1024**2
"""Below this, not even logs and a small checkpoint have room."""


def check(run: RunDir, node: str) -> None:
    """Looks at the run directory from this node.

    Raises:
        RunFailedError: it isn't there, isn't writable, or its disk is full; the message says what to do.
    """
    if not run.spec_file.is_file():
        raise RunFailedError(
            f"{run.spec_file} can't be read on node {node}: runs_dir must lie on a disk that all nodes share"
        )
    run.logs.mkdir(exist_ok=True)
    run.errors.mkdir(exist_ok=True)
    probe = run.path / f".probe-{node}-{os.getpid()}"
    try:
        probe.write_bytes(b"hpcdl\n" * 512)
        probe.unlink()
    except OSError as error:
        raise RunFailedError(f"{run.path} can't be written on node {node}: {error.strerror}") from error
    free = shutil.disk_usage(run.path).free
    if free < MIN_FREE_BYTES:
        raise RunFailedError(
            f"the disk of {run.path} is full on node {node}: {free // 1024**2} MiB are free, "
            f"{MIN_FREE_BYTES // 1024**2} MiB are needed"
        )
