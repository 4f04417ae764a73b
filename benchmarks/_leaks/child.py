"""One case as a process of its own: `python child.py NAME FOLDER STEPS PACE_S`."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
from pathlib import Path

import fresh
import healthy
import leaking
from work import Loop

from hpcdl.runs import beats

CASES = {
    **healthy.HEALTHY, **healthy.HELD_OUT, **leaking.LEAKS, **leaking.HELD_OUT, **fresh.HEALTHY, **fresh.LEAKS
}  # fmt: skip

if __name__ == "__main__":
    name, folder, steps, pace_s = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    os.environ[beats.FOLDER] = str(folder)
    random.seed(name)
    loop = Loop(folder, pace_s)
    loop.run(steps, CASES[name](loop))
