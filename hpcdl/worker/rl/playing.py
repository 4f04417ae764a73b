"""The Learner of an environment: all ranks play copies of it, and share each update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor

from hpcdl.distributed.engine import Batch, Engine
from hpcdl.distributed.mesh import Grid
from hpcdl.spec import ExperimentSpec
from hpcdl.tasks.policy_gradient import Config
from hpcdl.worker import optim
from hpcdl.worker.control import gather, words_of_all
from hpcdl.worker.data.batches import share
from hpcdl.worker.rl import draw, environments
from hpcdl.worker.rl.advantages import generalised, normal
from hpcdl.worker.rl.environments import Copies
from hpcdl.worker.rl.exchange import all_rows
from hpcdl.worker.rl.loop import Iteration
from hpcdl.worker.rl.policy import Loss, Policy, PolicyEngine


class Player:
    """Plays with the policy as it is, then goes over what all ranks have seen."""

    counts = "env_steps"

    def __init__(self, spec: ExperimentSpec, grid: Grid) -> None:
        """Makes the policy and this rank's copies.

        Args:
            spec: the experiment.
            grid: this rank's place.

        Raises:
            HpcdlError: there is no such environment, or its actions can't be chosen from.
        """
        assert spec.model.mlp is not None, "checked before submission"
        self.config = cast(Config, spec.task)
        self._spec, self._grid = spec, grid
        self._rank, self._ranks = grid.data_place
        first = environments.make(self.config.environment)
        self.sizes = environments.sizes(first)
        first.close()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)  # the same on every rank
            self.policy = Policy(spec.model.mlp, self.sizes).to(grid.device)
        self._loss = Loss(self.policy, self.config, grid.device)
        self.engine: Engine = PolicyEngine(
            spec.parallel, self._loss, grid, lambda parameters: optim.build(spec.optim, parameters)
        )
        self.engine.updates = self.config.updates(spec.trainer.global_batch_size)
        mine = np.array_split(np.arange(self.config.envs), self._ranks)[self._rank]
        self._copies = Copies(self.config.environment, mine.tolist(), spec.seed, grid.device)

    # --- an iteration -------------------------------------------------------------------------------------

    def iterate(self, iteration: int, learning_rate: float, settle: Callable[[], None]) -> Iteration:
        """Plays, then takes the optimizer's steps."""
        started = time.perf_counter()
        samples, episodes = self.collect(iteration)
        sampling_s = time.perf_counter() - started
        settle()
        norms = []
        for rows in self._minibatches(iteration):
            chosen = {name: samples[name][rows] for name in samples}
            chosen["advantages"] = normal(chosen["advantages"])
            self.engine.accumulate(self._micro_batches(chosen), len(rows))
            norms.append(self.engine.step(learning_rate, self._spec.trainer.max_grad_norm))
        seen = self.config.samples * self.config.epochs
        sums = gather(list(self._loss.measured()), self.engine.device).sum(dim=0) / seen
        measured = dict(zip(Loss.names, sums.tolist(), strict=True))
        return Iteration(
            measured={**episodes, **measured, "grad_norm": float(np.mean(norms))},
            count=self.config.samples,
            sampling_s=sampling_s,
        )

    def collect(self, iteration: int) -> tuple[Batch, dict[str, float]]:
        """All ranks' samples, a row each, in the order of copies and steps; and what their episodes were like.

        What the loss needs of the old policy is computed here from everyone's rows: the same on every rank, to the
        last bit.
        """
        config = self.config
        with torch.no_grad():
            played = self._copies.play(self.policy.probabilities, iteration, config.steps)
        names = ("observations", "actions", "rewards", "after", "ends", "cuts")
        mine = {name: torch.from_numpy(getattr(played, name)).to(self.engine.device) for name in names}
        mine |= {name: mine[name].to(torch.uint8) for name in ("ends", "cuts")}
        rows = all_rows(mine, self._ranks)
        with torch.no_grad():
            old, _ = self.policy.chosen(rows["observations"], rows["actions"])
            values, after = self.policy.values(rows["observations"]), self.policy.values(rows["after"])
        advantages = generalised(
            rows["rewards"], values, after, rows["ends"].bool(), rows["cuts"].bool(), config.gamma,
            1.0 if config.method == "reinforce" else config.gae_lambda,
        )  # fmt: skip
        found = {
            "observations": rows["observations"], "actions": rows["actions"], "old": old,
            "advantages": advantages, "returns": advantages + values,
        }  # fmt: skip
        return {name: each.flatten(0, 1) for name, each in found.items()}, self._episodes(played)

    def _episodes(self, played: environments.Played) -> dict[str, float]:
        """Means over the episodes that all ranks have finished; nothing where there was none."""
        everyone = words_of_all((played.returns, played.lengths))
        returns = [value for theirs, _ in everyone for value in theirs]
        lengths = [value for _, theirs in everyone for value in theirs]
        if not returns:
            return {"episodes": 0}
        return {
            "episodes": len(returns),
            "episode_return": float(np.mean(returns)),
            "episode_length": float(np.mean(lengths)),
        }

    def _minibatches(self, iteration: int) -> Iterator[Tensor]:
        """Rows of each optimizer step's samples, over all ranks."""
        batch = self._spec.trainer.global_batch_size
        for epoch in range(self.config.epochs):
            order = draw.permutation(self._spec.seed, iteration, epoch, self.config.samples)
            for at in range(0, len(order), batch):
                yield torch.from_numpy(order[at : at + batch]).to(self.engine.device)

    def _micro_batches(self, samples: Batch) -> list[Batch]:
        """This rank's share."""
        mine = share(np.arange(len(samples["actions"])), self._rank, self._ranks)
        size = self._spec.trainer.micro_batch_size
        some = [slice(int(mine[at]), int(mine[at]) + size) for at in range(0, len(mine), size)]
        return [{name: each[part] for name, each in samples.items()} for part in some]

    # --- evaluation ---------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Mean and lowest return of whole episodes, `trainer.eval_samples` of them, with the likeliest actions."""
        mine = range(self._rank, self._spec.trainer.eval_samples, self._ranks)
        returns = [
            each
            for theirs in words_of_all(self._copies.finish(self.policy.probabilities, list(mine)))
            for each in theirs
        ]
        return {"eval_return": float(np.mean(returns)), "eval_return_min": float(np.min(returns))}

    def worth(self, evaluated: Mapping[str, float]) -> float:
        """The mean return."""
        return evaluated["eval_return"]

    def close(self) -> None:
        """Lets the copies go."""
        self._copies.close()
