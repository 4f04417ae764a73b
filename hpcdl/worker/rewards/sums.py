"""Sums of two digits: `3+9=` wants `12`, and then nothing more.

1 for the right number, alone; else a tenth for each of its digits that stands where it should, so that a model which
has never seen a sum learns to write digits first.
"""

from __future__ import annotations

import random

from hpcdl.worker.rewards import Problem

PART = 0.1


def problem(draw: random.Random) -> Problem:
    """One of a hundred."""
    first, second = draw.randrange(10), draw.randrange(10)
    return Problem(f"{first}+{second}=", str(first + second))


def reward(problem: Problem, answer: str) -> float:
    """1, or what is right of it."""
    if answer.strip() == problem.answer:
        return 1.0
    right = sum(mine == theirs for mine, theirs in zip(answer, problem.answer, strict=False))
    return PART * right / len(problem.answer)
