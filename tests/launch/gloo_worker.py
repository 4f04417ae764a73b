"""A worker that talks over real gloo until one rank fails, as MODE says: `gloo_worker.py RUN_DIR`.

Reports as hpcdl's own workers do, and ends at once with an error file for each exception.
"""

import ctypes
import os
import sys
import time
from pathlib import Path

FAILS = int(os.environ.get("FAILS", "2"))
mode, rank = os.environ["MODE"], int(os.environ["RANK"])
if mode == "import" and rank == FAILS:
    import a_package_that_is_not_there  # noqa: F401

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from hpcdl.runs.store import RunDir  # noqa: E402
from hpcdl.worker import errors, process  # noqa: E402


def work():
    process.one_output()
    dist.init_process_group("gloo")
    for step in range(1, 200):
        dist.all_reduce(torch.ones(4))
        if rank == FAILS:
            print(f"step {step} of the rank that fails", flush=True)
        if rank == FAILS and step == 3:
            fail()
        time.sleep(0.02)


def fail():
    sys.stdout.write("a line without an end")
    sys.stdout.flush()
    if mode == "raise":
        raise ValueError("the loss is nan\nat step 3")
    if mode == "segv":
        ctypes.string_at(0)
    if mode == "abort":  # as C++ does
        os.write(2, b"terminate called after throwing an instance of 'std::runtime_error'\n  what():  boom\n")
        os.abort()
    if mode == "kill":
        os.kill(os.getpid(), 9)
    if mode == "exit":
        os._exit(7)


try:
    work()
except BaseException as error:
    try:
        errors.report(RunDir(Path(sys.argv[1])), process.from_environment(), 3, error)
    finally:
        os._exit(errors.exit_code(error))
