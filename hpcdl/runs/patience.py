"""Waiting for a scheduler that doesn't answer: 1, 2, 4, … 30 s between tries, bounded, and each wait is said."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

MISSING = "is not on this machine"
"""In the words of a command that isn't installed: no waiting helps."""
VARIABLE = "HPCDL_SLURM_PATIENCE_S"
"""Environment variable: seconds that a launch or a cancel goes on asking; 0 asks once."""
LAUNCH_S = 60.0
"""Without it."""
LOOK_S = 4.0
"""The most that a look (`hpcdl status`) goes on asking: it can say «unknown», and be asked again."""
FIRST_S = 1.0
MOST_S = 30.0
GROWTH = 2.0


def say_on_stderr(line: str) -> None:
    """A remark beside the output."""
    print(f"hpcdl: {line}", file=sys.stderr, flush=True)


def of_environment(most_s: float = LAUNCH_S) -> float:
    """Seconds that are waited at most: `most_s`, or what $HPCDL_SLURM_PATIENCE_S says."""
    try:
        return max(0.0, float(os.environ[VARIABLE]))
    except (KeyError, ValueError):
        return most_s


def delay_s(failures: int) -> float:
    """Seconds until the next try, after so many that failed."""
    return min(FIRST_S * GROWTH ** (failures - 1), MOST_S)


def words(why: str, delay: float, who: str = "Slurm") -> str:
    """What is said of a wait.

    Args:
        why: the command's own words.
        delay: seconds until the next try.
        who: does not answer.
    """
    return f"{who} does not answer ({why}); next try in {max(1, round(delay))} s"


@dataclass(slots=True)
class Patience:
    """One stretch of waiting. Ctrl-C ends a wait as it ends any other."""

    total_s: float
    """Seconds from its making on, the tries themselves included."""
    say: Callable[[str], None] = say_on_stderr
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    tries: int = 0
    """Failures so far."""
    who: str = "Slurm"
    """Who doesn't answer."""
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self._since = self.clock()

    def wait(self, why: str) -> bool:
        """Says that there was no answer, and waits before the next try; False where it has been enough.

        Args:
            why: the command's own words.
        """
        self.tries += 1
        left = self._since + self.total_s - self.clock()
        if left <= 0 or MISSING in why:
            return False
        delay = min(delay_s(self.tries), left)
        self.say(words(why, delay, self.who))
        self.sleep(delay)
        return True
