"""Notes when each Python process of a job starts, and when a worker runs the first line of its program.

On PYTHONPATH of both jobs that slurm_start.py compares, so that neither needs a line of its own for it.
One file a process below $BENCH_PROBE: {host, pid, ppid, program, interpreter, first_line}, epoch seconds.
$BENCH_WORKERS: the programs (`:` between them) whose first line is waited for.
"""

import json
import os
import socket
import sys
import time
from types import FrameType


def program(argv: list[str]) -> str | None:
    """The end of the file name of the program in a Python command line; None without one (`-c`)."""
    words = iter(argv[1:])
    for word in words:
        if word == "-m":
            return next(words, "").replace(".", "/")
        if word in ("-X", "-W"):
            next(words, None)
        elif word.startswith("-c"):
            return None
        elif not word.startswith("-"):
            return word
    return None


def write(note: dict[str, object]) -> None:
    path = f"{os.environ['BENCH_PROBE']}/{note['host']}-{note['pid']}.json"
    with open(path, "w") as file:  # noqa: PTH123
        json.dump(note, file)


def watch(note: dict[str, object], endings: tuple[str, ...]) -> None:
    """Waits for the program's first line with a profile function, which is gone once it has seen it.

    Not with an audit hook: that can't be taken out again, and slows down every import that comes after.
    """

    def entered(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_name == "<module>" and code.co_filename.endswith(endings):
            note["first_line"] = time.time()
            sys.setprofile(None)
            write(note)

    sys.setprofile(entered)


def start(name: str) -> None:
    note: dict[str, object] = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "ppid": os.getppid(),
        "program": name,
        "interpreter": time.time(),
    }
    if name.endswith(tuple(os.environ["BENCH_WORKERS"].split(":"))):
        watch(note, (name, f"{name}.py"))
    else:
        write(note)


_name = program(sys.orig_argv)
if "BENCH_PROBE" in os.environ and _name:
    start(_name)
