"""The real worker, whose steps keep what they should let go: `python leaky_worker.py RUN_DIR`."""

import sys
import time
from pathlib import Path

from hpcdl.runs.store import RunDir
from hpcdl.worker import loop, main

kept = []
step = loop.train_step


def leaking_step(*args):
    kept.append(bytearray(b"\1") * 100_000)  # LEAK
    time.sleep(0.03)  # samples of many steps, also on a quick machine
    return step(*args)


loop.train_step = leaking_step
main.main(RunDir(Path(sys.argv[1]).absolute()))
