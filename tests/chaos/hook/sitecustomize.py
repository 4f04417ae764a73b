"""In the workers, by PYTHONPATH: the calls that go to the shared disk are slow, hang, or find no room, as a file says.

A real full or slow disk needs a file system of its own under the runs, shared by several containers and limited: what
stands here for it returns to the program what such a disk returns, at the calls where NFS returns it (write, fsync).
The agents' own writes to a really full disk are in tests/launch/test_full_disk.py.
"""

import errno
import os
import re
import time
from pathlib import Path

CONTROL = Path(os.environ.get("CHAOS_DISK", "/nonexistent"))
LOOK_S = 0.2
STEP = re.compile(rb'"step": (\d+)')
_write, _fsync = os.write, os.fsync


def _told(name: str) -> bool:
    return (CONTROL / name).exists()


def _path(descriptor: int) -> str:
    try:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())
    except OSError:
        return ""


def _disk(path: str) -> None:
    if "/runs/" not in path:
        return
    while _told("hung"):
        time.sleep(LOOK_S)
    if _told("full"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def write(descriptor, data):  # type: ignore[no-untyped-def]
    """As os.write. A step's line first waits as the file `pace` says: training lasts as long as the faults.

    `pace` has seconds a step, and seconds a step beyond the one that stands third: nobody gets far ahead of the faults.
    """
    path = _path(descriptor)
    if path.endswith("/metrics.jsonl") and _told("pace"):  # also while the disk is full
        usual, ahead, until = (float(word) for word in (CONTROL / "pace").read_text().split())
        step = STEP.search(data)
        time.sleep(ahead if step and int(step[1]) > until else usual)
    _disk(path)
    return _write(descriptor, data)


def fsync(file):  # type: ignore[no-untyped-def]
    """As os.fsync."""
    _disk(_path(file if isinstance(file, int) else file.fileno()))
    _fsync(file)


os.write, os.fsync = write, fsync
