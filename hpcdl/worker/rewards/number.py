"""The last number of the answer is the last number of the example's: as sums and word problems are judged (GSM8K)."""

from __future__ import annotations

import re

from hpcdl.worker.rewards import Problem

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> float | None:
    """None where there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def reward(problem: Problem, answer: str) -> float:
    """1 where they are the same, else 0."""
    wanted = last_number(problem.answer)
    return float(wanted is not None and last_number(answer) == wanted)
