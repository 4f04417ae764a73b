"""Is a local run's agent alive? And how much memory does a run hold on this machine?"""

from __future__ import annotations

import os
import signal
import time
from datetime import datetime
from typing import Literal

from hpcdl.runs.state import RunState

CLOCK_TOLERANCE_S = 2.0
"""Two readings of one process's start differ by this much at most."""
KILL_LIMIT_S = 10.0
"""How long the kernel may take to end a process that was killed."""

Life = Literal["alive", "gone", "elsewhere", "unborn"]
"""`elsewhere`: on another machine, can't be judged from here; `unborn`: no process was recorded."""


def alive(pid: int, started: float | None) -> bool:
    """Whether `pid` is still the process that started at `started` (psutil's create_time, seconds).

    A process that has ended but was not waited for counts as gone.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return started is None or abs(process.create_time() - started) <= CLOCK_TOLERANCE_S
    except psutil.Error:
        return False


def create_time(pid: int) -> float:
    """When a process started, as `alive` wants it."""
    import psutil

    return float(psutil.Process(pid).create_time())


def agent_life(state: RunState) -> Life:
    """Whether the agent of a local run lives. What a pending run's state says of one is an earlier try's."""
    if state.agent_pid is None or state.state == "PENDING":
        return "unborn"
    if state.host is not None and state.host != os.uname().nodename:
        return "elsewhere"
    return "alive" if alive(state.agent_pid, state.agent_started) else "gone"


def booted_since(state: RunState) -> bool:
    """Whether this machine was started after the run was."""
    import psutil

    if state.started is None:
        return False
    return float(psutil.boot_time()) > datetime.fromisoformat(state.started).timestamp()


def signal_agent(state: RunState, number: signal.Signals) -> bool:
    """Sends a signal to a local run's agent; False where there is none on this machine."""
    if state.agent_pid is None or agent_life(state) != "alive":
        return False
    try:
        os.kill(state.agent_pid, number)
    except ProcessLookupError:
        return False
    return True


def kill_tree(state: RunState) -> None:
    """Ends a local run's agent and all below it, hard."""
    import psutil

    if state.agent_pid is None or agent_life(state) != "alive":
        return
    try:
        agent = psutil.Process(state.agent_pid)
        family = [*agent.children(recursive=True), agent]
    except psutil.Error:
        return
    # The agent first: it must not take its workers' end for a failure of theirs and say so in state.json.
    for process in reversed(family):
        try:
            process.kill()
        except psutil.Error:
            continue
    deadline = time.monotonic() + KILL_LIMIT_S
    # Not psutil's wait: it would reap children of ours that someone else waits for.
    while any(alive(process.pid, None) for process in family) and time.monotonic() < deadline:
        time.sleep(0.01)


def resident_bytes(state: RunState) -> int | None:
    """Memory that a local run's processes hold together (RSS); None where it can't be seen from here."""
    import psutil

    if state.agent_pid is None or agent_life(state) != "alive":
        return None
    try:
        agent = psutil.Process(state.agent_pid)
        family = [agent, *agent.children(recursive=True)]
    except psutil.Error:
        return None
    total = 0
    for process in family:
        try:
            total += int(process.memory_info().rss)
        except psutil.Error:
            continue
    return total
