"""Notes when each Python process of a job starts, and when it runs the first line of its program.

On PYTHONPATH of both jobs that slurm_start.py compares, so that neither needs a line of its own for it.
One file a process below $BENCH_PROBE: {host, pid, ppid, program, interpreter, first_line}, epoch seconds.
"""

import json
import os
import socket
import sys
import time
from types import CodeType


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


def watch(folder: str, name: str) -> None:
    """Waits for the program's first line by an audit hook; hooks stay, so this one turns itself deaf."""
    endings = (name, f"{name}.py", f"{name}/__main__.py")
    note = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "ppid": os.getppid(),
        "program": name,
        "local_rank": os.environ.get("LOCAL_RANK"),
        "interpreter": time.time(),
    }
    waiting = True

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal waiting
        if not waiting or event != "exec" or not isinstance(args[0], CodeType):
            return
        if args[0].co_name == "<module>" and args[0].co_filename.endswith(endings):
            waiting = False
            note["first_line"] = time.time()
            with open(f"{folder}/{note['host']}-{note['pid']}.json", "w") as file:  # noqa: PTH123
                json.dump(note, file)

    sys.addaudithook(hook)


_folder, _name = os.environ.get("BENCH_PROBE"), program(sys.orig_argv)
if _folder and _name:
    watch(_folder, _name)
