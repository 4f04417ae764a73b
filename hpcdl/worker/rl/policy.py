"""The network that plays an environment, and its loss.

Source: Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning", 1992;
Schulman et al., "Proximal Policy Optimization Algorithms", 2017, eq. 7 and 9.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from hpcdl.distributed.data_parallel import replicate
from hpcdl.distributed.engine import Batch, Engine, MakeOptimizer
from hpcdl.distributed.mesh import Grid
from hpcdl.spec.model import MlpShape
from hpcdl.tasks.policy_gradient import Config
from hpcdl.worker.rl.environments import Sizes

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


def layers(widths: Sequence[int], activation: str, last_gain: float) -> nn.Sequential:
    """Linear layers from each width to the next, orthogonal weights and no bias at first.

    Gains as in Andrychowicz et al., "What Matters for On-Policy Deep Actor-Critic Methods?", ICLR 2021: a small last
    layer of the policy has all actions about equally likely at first.
    """
    made: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(widths), start=1):
        linear = nn.Linear(before, after)
        last = number == len(widths) - 1
        nn.init.orthogonal_(linear.weight, last_gain if last else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        made += [linear] if last else [linear, ACTIVATIONS[activation]()]
    return nn.Sequential(*made)


class Policy(nn.Module):
    """Probabilities of actions, and the value of a state, by two networks of the same widths."""

    def __init__(self, shape: MlpShape, sizes: Sizes) -> None:
        super().__init__()
        self.actor = layers((sizes.inputs, *shape.widths, sizes.actions), shape.activation, 0.01)
        self.critic = layers((sizes.inputs, *shape.widths, 1), shape.activation, 1.0)

    def probabilities(self, observations: Tensor) -> Tensor:
        """`(…, actions)`."""
        return cast(Tensor, self.actor(observations)).softmax(-1)

    def values(self, observations: Tensor) -> Tensor:
        """`(…)`."""
        return cast(Tensor, self.critic(observations)).squeeze(-1)

    def chosen(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log π(a|s) of the actions, and the policy's entropy, both `(…)`."""
        logs = cast(Tensor, self.actor(observations)).log_softmax(-1)
        entropy = -(logs.exp() * logs).sum(-1)
        return logs.gather(-1, actions[..., None]).squeeze(-1), entropy


class Loss(nn.Module):
    """The policy under its loss: what is wrapped and trained.

        L = -min(ρ·A, clip(ρ, 1 - ε, 1 + ε)·A) + c_v·(V(s) - R)² - c_e·H        ρ = π(a|s) / π_old(a|s)

    REINFORCE has log π(a|s)·A in the place of the first term: the same gradient where π is still π_old.
    """

    names = ("loss", "policy_loss", "value_loss", "entropy", "kl", "clip_fraction")
    """What it measures: means over samples. `kl`: KL(π_old ‖ π), estimated as ρ - 1 - log ρ (Schulman, 2020)."""

    def __init__(self, policy: Policy, config: Config, device: torch.device) -> None:
        super().__init__()
        self.policy = policy
        self._config = config
        self._sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)

    def forward(self, batch: Batch) -> Tensor:
        """Summed loss `(1,)` of rows of `observations`, `actions`, `old` (log π_old), `advantages` and `returns`."""
        config, advantages = self._config, batch["advantages"]
        logs, entropy = self.policy.chosen(batch["observations"], batch["actions"])
        change = logs - batch["old"]
        ratio = change.exp()
        if config.method == "reinforce":
            gain = logs * advantages
        else:
            bounded = ratio.clamp(1 - config.clip, 1 + config.clip)
            gain = torch.minimum(ratio * advantages, bounded * advantages)
        error = (self.policy.values(batch["observations"]) - batch["returns"]).square()
        loss = -gain + config.value_coef * error - config.entropy_coef * entropy
        clipped = (ratio - 1).abs() > config.clip
        parts = (loss, -gain, error, entropy, ratio - 1 - change, clipped)
        with torch.no_grad():
            self._sums += torch.stack([part.sum(dtype=torch.float64) for part in parts])
        return loss.sum().reshape(1)

    def measured(self) -> Tensor:
        """This rank's sums since the last call, fp64 `(len(names),)`."""
        found = self._sums.clone()
        self._sums.zero_()
        return found


class PolicyEngine(Engine):
    """Copies of the policy, their gradients averaged over all ranks."""

    def __init__(self, config: Any, loss: Loss, grid: Grid, make_optimizer: MakeOptimizer) -> None:
        """Wraps the loss.

        Args:
            config: the strategy's MeshConfig.
            loss: with the policy on its device.
            grid: this rank's place.
            make_optimizer: makes the optimizer.
        """
        alone = grid.dims.gradient_ranks == 1
        wrapped = loss if alone else replicate(config, cast(Any, loss), grid)
        super().__init__([wrapped], grid, make_optimizer, autocast=False)

    def _forward(self, batch: Batch) -> Tensor:
        return cast(Tensor, self.stages[0](batch))
