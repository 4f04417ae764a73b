"""Disks that are full: a limit on a process's files, which anybody may set, and a small tmpfs, which root may mount."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REQUIRED = os.environ.get("HPCDL_REQUIRE_CLUSTER") == "1"


@contextlib.contextmanager
def small(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own size in a folder. Where only root may mount and we are not, the test is skipped and says so;
    where the cluster is required (CI) that is a failure."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        (pytest.fail if REQUIRED else pytest.skip)(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Takes all the room that a disk has left; unlink the file to give it back."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 65536)
    return filler


def limited(code: str, folder: Path) -> Any:
    """Runs Python code in a process whose files may be limited; what it assigns to `answer` comes back.

    `limit(n)` sets the limit (EFBIG stands for ENOSPC), `limit()` lifts it.
    """
    frame = f"""
import json, resource, sys
from pathlib import Path
def limit(size=resource.RLIM_INFINITY):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
folder = Path({str(folder)!r})
{code}
limit()
print(json.dumps(answer))
"""
    # Pipes have no length: only files are limited.
    done = subprocess.run(
        [sys.executable, "-c", frame], capture_output=True, text=True, env={**os.environ}, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr
