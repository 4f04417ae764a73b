"""How much better an action or an answer was than expected."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_SPREAD = 1e-4
"""Added to a group's standard deviation: where all answers are worth the same, none is better."""


def generalised(
    rewards: Tensor, values: Tensor, after: Tensor, ends: Tensor, cuts: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimation, `(copies, steps)`.

        δ_t = r_t + γ·V(s_{t+1}) - V(s_t)        A_t = δ_t + γ·λ·A_{t+1}

    With λ = 1 that is the discounted return less the value: REINFORCE's baseline. Where an episode ends, nothing
    follows; where it is cut (a time limit, the last step of an iteration), V of the last state stands for what would
    have followed (Pardo et al., "Time Limits in Reinforcement Learning", ICML 2018).

    Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", ICLR 2016,
    eq. 16.

    Args:
        rewards: `(copies, steps)`.
        values: V(s_t).
        after: V of the state that step t has led to, before any reset.
        ends: whether the episode has ended there by itself.
        cuts: whether it was cut there.
        gamma: γ.
        lam: λ.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * after[:, t] * ~ends[:, t] - values[:, t]
        following = delta + gamma * lam * following * ~(ends[:, t] | cuts[:, t])
        advantages[:, t] = following
    return advantages


def normal(values: Tensor) -> Tensor:
    """With mean 0 and standard deviation 1; one value alone: 0."""
    spread = values.std() if values.numel() > 1 else torch.zeros_like(values.sum())
    return (values - values.mean()) / (spread + 1e-8)


def within_groups(rewards: Tensor) -> Tensor:
    """Each reward less its group's mean, in its group's standard deviations, `(groups, answers)`.

    Source: Shao et al., "DeepSeekMath", 2024, section 4.1.2.
    """
    mean = rewards.mean(dim=1, keepdim=True)
    return (rewards - mean) / (rewards.std(dim=1, keepdim=True) + LEAST_SPREAD)
