"""Sums of two digits, after three worked examples: `3+9=` wants `12`.

1 where the answer begins with the right number, else 0. What the model writes after it doesn't count: it goes on with
another example, as it has read three.
"""

from __future__ import annotations

import random
import re

from hpcdl.worker.rewards import Problem

EXAMPLES = "1+1=2\n4+8=12\n7+2=9\n"
NUMBER = re.compile(r"\s*(\d+)")


def problem(draw: random.Random) -> Problem:
    """One of a hundred."""
    first, second = draw.randrange(10), draw.randrange(10)
    return Problem(f"{EXAMPLES}{first}+{second}=", str(first + second))


def reward(problem: Problem, answer: str) -> float:
    """1 or 0."""
    found = NUMBER.match(answer)
    return float(found is not None and found[1] == problem.answer)
