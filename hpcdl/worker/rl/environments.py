"""Copies of an environment, played by a policy that sees all of a rank's copies at once.

Each iteration begins all copies anew, with seeds of (seed, iteration, copy, episode): what a copy does depends on
nothing before, so that a run resumes exactly and on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hpcdl.errors import HpcdlError
from hpcdl.worker.rl import draw

if TYPE_CHECKING:
    from numpy.typing import NDArray

Probabilities = Callable[[Tensor], Tensor]
"""Observations `(copies, inputs)` → probabilities of the actions `(copies, actions)`."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a policy for an environment takes and gives."""

    inputs: int
    """Numbers of an observation."""
    actions: int
    """Actions to choose from."""


@dataclass(slots=True)
class Played:
    """What a rank's copies have seen, each `(copies, steps, …)`, and the episodes that came to their end."""

    observations: NDArray[np.float32]
    actions: NDArray[np.int64]
    rewards: NDArray[np.float32]
    after: NDArray[np.float32]
    """The observation that a step has led to, before any reset."""
    ends: NDArray[np.bool_]
    """The episode ended there by itself."""
    cuts: NDArray[np.bool_]
    """It was cut there: a time limit, or the iteration's last step."""
    returns: list[float] = field(default_factory=list)
    """Of the episodes that are over, undiscounted."""
    lengths: list[int] = field(default_factory=list)
    """Their steps."""


def make(name: str) -> Any:
    """One copy.

    Raises:
        HpcdlError: gymnasium isn't there, or knows no such environment.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise HpcdlError(
            "task=policy_gradient plays gymnasium's environments: pip install 'hpcdl[rl]'"
        ) from error
    try:
        return gymnasium.make(name, disable_env_checker=True)
    except (gymnasium.error.Error, ImportError) as error:
        raise HpcdlError(f"task.environment={name}: {error}") from error


def sizes(environment: Any) -> Sizes:
    """What its policy looks like.

    Raises:
        HpcdlError: its observations are no box of numbers, or its actions not so many to choose from.
    """
    from gymnasium.spaces import Box, Discrete

    seen, acts = environment.observation_space, environment.action_space
    if not isinstance(seen, Box) or not isinstance(acts, Discrete):
        raise HpcdlError(
            f"task.environment={environment.spec.id}: observations must be a Box and actions Discrete, and they are"
            f" {type(seen).__name__} and {type(acts).__name__}"
        )
    return Sizes(int(np.prod(seen.shape)), int(acts.n))


def choose(probabilities: Tensor, chances: NDArray[np.float64]) -> NDArray[np.int64]:
    """The action at which the summed probabilities pass a number between 0 and 1, a row each."""
    sums = probabilities.double().cumsum(-1).cpu().numpy()
    found: NDArray[np.int64] = (sums < chances[:, None] * sums[:, -1:]).sum(-1)
    return found.clip(max=sums.shape[-1] - 1)


class Copies:
    """Some of an experiment's copies: those of one rank."""

    def __init__(self, name: str, numbers: Sequence[int], seed: int, device: torch.device) -> None:
        """Makes them.

        Args:
            name: the environment.
            numbers: which of all copies these are.
            seed: the experiment's.
            device: where the policy is.
        """
        self._numbers = list(numbers)
        self._copies = [make(name) for _ in self._numbers]
        self._seed, self._device = seed, device

    def _reset(self, index: int, purpose: int, place: Sequence[int]) -> NDArray[np.float32]:
        seed = draw.number(self._seed, purpose, *place)
        seen, _ = self._copies[index].reset(seed=seed)
        return np.asarray(seen, np.float32).ravel()

    def play(self, policy: Probabilities, iteration: int, steps: int) -> Played:
        """So many steps of each copy, from the beginning of an episode; the next one begins where one is over."""
        count = len(self._copies)
        episodes = [0] * count
        seen = np.stack([self._reset(i, draw.RESET, (iteration, n, 0)) for i, n in enumerate(self._numbers)])
        chances = np.stack(
            [draw.stream(self._seed, draw.ACT, iteration, n).random(steps) for n in self._numbers]
        )
        played = Played(
            observations=np.zeros((count, steps, seen.shape[1]), np.float32),
            actions=np.zeros((count, steps), np.int64),
            rewards=np.zeros((count, steps), np.float32),
            after=np.zeros((count, steps, seen.shape[1]), np.float32),
            ends=np.zeros((count, steps), np.bool_),
            cuts=np.zeros((count, steps), np.bool_),
        )
        sums, lengths = [0.0] * count, [0] * count
        for t in range(steps):
            actions = choose(policy(torch.from_numpy(seen).to(self._device)), chances[:, t])
            played.observations[:, t], played.actions[:, t] = seen, actions
            for i, n in enumerate(self._numbers):
                found, reward, ended, cut, _ = self._copies[i].step(int(actions[i]))
                seen[i] = np.asarray(found, np.float32).ravel()
                sums[i], lengths[i] = sums[i] + float(reward), lengths[i] + 1
                played.rewards[i, t], played.after[i, t] = reward, seen[i]
                played.ends[i, t], played.cuts[i, t] = ended, cut or t == steps - 1
                if ended or cut:
                    played.returns.append(sums[i])
                    played.lengths.append(lengths[i])
                    sums[i], lengths[i], episodes[i] = 0.0, 0, episodes[i] + 1
                    seen[i] = self._reset(i, draw.RESET, (iteration, n, episodes[i]))
        return played

    def finish(self, policy: Probabilities, episodes: Sequence[int]) -> list[float]:
        """Returns of whole episodes, each action the likeliest one; as many at a time as there are copies.

        Args:
            policy: who plays.
            episodes: their numbers among the held-out ones: each begins as its number says.
        """
        returns: list[float] = []
        for at in range(0, len(episodes), len(self._copies)):
            some = episodes[at : at + len(self._copies)]
            seen = np.stack([self._reset(i, draw.HELDOUT + draw.RESET, (n,)) for i, n in enumerate(some)])
            sums, going = [0.0] * len(some), list(range(len(some)))
            while going:
                actions = policy(torch.from_numpy(seen[going]).to(self._device)).argmax(-1).tolist()
                for i, action in zip(list(going), actions, strict=True):
                    found, reward, ended, cut, _ = self._copies[i].step(action)
                    seen[i] = np.asarray(found, np.float32).ravel()
                    sums[i] += float(reward)
                    if ended or cut:
                        going.remove(i)
            returns += sums
        return returns

    def close(self) -> None:
        """Lets them go."""
        for copy in self._copies:
            copy.close()
