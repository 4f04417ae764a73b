"""kill -9 between any two lines."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any


def killed_at(number: int, act: Callable[[], object], watched: Callable[[str], bool], most: int = 0) -> bool:
    """Acts in a process that is killed before the n-th line of the code that is looked at.

    Args:
        number: counts from 0.
        act: what the process does.
        watched: whether lines of a file count, by its path.
        most: how often a line counts that comes again and again; 0: each time.

    Returns:
        False once there are no so many lines: all was done.
    """
    pid = os.fork()
    if pid == 0:
        left = number
        seen: Counter[tuple[str, int]] = Counter()

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            file = frame.f_code.co_filename
            if not watched(file):
                return None
            if event == "line":
                seen[file, frame.f_lineno] += 1
                left -= not most or seen[file, frame.f_lineno] <= most
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            act()
            sys.settrace(None)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), f"line {number}: the child ended with {code}"
    return code != 0
