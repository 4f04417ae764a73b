"""What an answer is worth: a file a reward, found by name (`task.reward=NAME`), or a file of your own by its path.

A reward's file holds

- `reward(problem, answer) -> float`: what the text of an answer is worth; a function of nothing else;
- `problem(draw) -> Problem`, where it makes its own problems (data=none): from a random.Random, as often as asked.

Checked before submission by reading the file, which is not run there (hpcdl/tasks/policy_gradient.py).
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpcdl.errors import HpcdlError
from hpcdl.tasks.policy_gradient import reward_file


@dataclass(frozen=True, slots=True)
class Problem:
    """What a model is asked, and what tells a right answer."""

    prompt: str
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward's file."""

    reward: Callable[[Problem, str], float]
    problem: Callable[[random.Random], Problem] | None
    """None: problems come from `data`."""
    path: Path


def load(name: str) -> Reward:
    """The reward called so.

    Args:
        name: a file of this folder, or the path of a .py.

    Raises:
        HpcdlError: it can't be run.
    """
    path = reward_file(name)
    found = importlib.util.spec_from_file_location(f"hpcdl_reward_{path.stem}", path)
    if found is None or found.loader is None or not path.is_file():
        raise HpcdlError(f"task.reward={name}: there is no {path} on this node")
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise HpcdlError(
            f"task.reward={name}: {path} can't be run: {type(error).__name__}: {error}"
        ) from error
    return Reward(reward=module.reward, problem=getattr(module, "problem", None), path=path)
