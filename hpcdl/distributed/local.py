"""Copies that train by themselves for a while and are then made one: local SGD and DiLoCo.

Sources: hpcdl/parallel/local_sgd.py and diloco.py. torch's own PeriodicModelAverager is not used: it averages
after the first step already, and leaves every parameter a view of one buffer, which transformers takes for
tied weights when it saves the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hpcdl.distributed.collectives import average
from hpcdl.distributed.decoder import Stage, blocks
from hpcdl.distributed.engine import Batch, Engine, prime
from hpcdl.distributed.mesh import Grid
from hpcdl.distributed.parallelize import Job, checkpoint_activations
from hpcdl.distributed.parking import parking

MOST_LAG = 8
"""Between averages ranks needn't wait for one another, but a stop is heard this many steps late."""


def alone(model: nn.Module, grid: Grid, job: Job) -> Stage:
    """The whole model as one stage on this rank's device, under no wrapper that talks to others."""
    stage = Stage(model)
    checkpoint_activations(stage, job.checkpointing)
    stage.parking = parking(job.offload, grid.device)
    if job.compile:
        for block in blocks(stage):
            block.compile()
    return stage.to(grid.device)


def root_mean_square(norms: Tensor) -> float:
    """Of the norms of ranks that each have a gradient of their own, `(ranks,)`."""
    return math.sqrt(math.fsum(norms.square().tolist()) / len(norms))


class LocalEngine(Engine):
    """Each rank steps its own copy; every `sync_every` steps the copies are averaged."""

    strategy = "local_sgd"

    def __init__(
        self,
        stage: nn.Module,
        grid: Grid,
        job: Job,
        *,
        sync_every: int,
        average_optimizer_state: bool = False,
    ) -> None:
        """Takes this rank's copy.

        Args:
            stage: the whole model.
            grid: only `dp_replicate` may be above 1.
            job: what the training asks for.
            sync_every: steps between two averages.
            average_optimizer_state: whether the optimizer's state is averaged with the weights.
        """
        super().__init__([stage], grid, job.make_optimizer, autocast=job.autocast)
        self.lag, self.period = min(sync_every - 1, MOST_LAG), sync_every
        self._group = grid.group("dp_replicate")
        self._every = sync_every
        self._last = job.max_steps
        self._with_optimizer = average_optimizer_state
        self._done = 0
        self._begun = False
        self._apart = False
        """Whether the ranks' weights differ."""
        self._to_load: dict[str, Tensor] = {}

    def step(self, learning_rate: float, max_norm: float | None) -> float:
        """Steps this rank's copy, and makes the copies one where it is time.

        Returns:
            The norm of this rank's own gradient before clipping.
        """
        norm = super().step(learning_rate, max_norm)
        self._done += 1
        self._begun = self._apart = True
        self._to_load = {}
        if self._done % self._every == 0 or self._done == self._last:
            self._synchronise()
            self._apart = False
        return norm

    def norm_of(self, norms: Tensor) -> float:
        """The root mean square of the ranks' norms."""
        return root_mean_square(norms)

    def _synchronise(self) -> None:
        average([p.detach() for p in self.trainable.values()], self._group)
        if self._with_optimizer:
            average(self._optimizer_state().values(), self._group)

    def _optimizer_state(self) -> dict[str, Tensor]:
        return {k: v for k, v in super().state().items() if k.startswith("optimizer.")}

    # --- evaluation ---------------------------------------------------------------------------------------

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """As every engine's, on the average of the copies."""
        if not self._apart:
            return super().evaluate(batches)
        with self._averaged():
            return super().evaluate(batches)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The average of the copies in the place of this rank's, which comes back afterwards."""
        weights = [p.detach() for p in self.trainable.values()]
        own = [weight.clone() for weight in weights]
        average(weights, self._group)
        yield
        for weight, before in zip(weights, own, strict=True):
            weight.copy_(before)

    # --- state --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """The average of the copies under the names of all strategies, each rank's own under `own.…`.

        `own.<strategy>.<ranks>.<name>` is a DTensor with one row a rank, so that ranks have the same names;
        with another number of ranks it is another name, and the averages are all there is. It is left out
        where the ranks have the same.
        """
        live = super().state()
        if not self._begun:  # what it is called for is to be loaded into, the rows last: see `restored`
            self._to_load = {name: value.clone() for name, value in live.items()}
            return live | self._rows(self._to_load)
        differing = {
            name: value
            for name, value in live.items()
            if self._apart or not (self._with_optimizer or name.startswith("model."))
        }
        # Copies: an evaluation puts other weights into the live ones for a while, and a save may still read.
        own = {name: value.clone() for name, value in differing.items()}
        averages = {name: value.clone() for name, value in differing.items()}
        average(averages.values(), self._group)
        return live | averages | self._rows(own)

    def _rows(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from torch.distributed.tensor import DTensor, Shard

        mesh = self.grid.mesh["dp_replicate"]
        return {
            self._own(name): DTensor.from_local(value.unsqueeze(0), mesh, [Shard(0)])
            for name, value in tensors.items()
        }

    def _own(self, name: str) -> str:
        return f"own.{self.strategy}.{self.grid.dims.dp_replicate}.{name}"

    def restored(self, step: int, keys: frozenset[str]) -> None:
        """This rank's own, where the checkpoint has it, instead of the averages."""
        super().restored(step, keys)
        self._done = step
        live = super().state()
        for name, value in self._to_load.items():
            if self._own(name) in keys:
                live[name].copy_(value)
                self._apart = self._apart or name.startswith("model.")
        self._to_load = {}


class DilocoEngine(LocalEngine):
    """Each rank steps its own copy; every `sync_every` steps an outer optimizer steps for all."""

    strategy = "diloco"

    def __init__(
        self,
        stage: nn.Module,
        grid: Grid,
        job: Job,
        *,
        sync_every: int,
        outer_lr: float,
        outer_momentum: float,
    ) -> None:
        """Takes this rank's copy; the outer weights begin as it does.

        Args:
            stage: the whole model.
            grid: only `dp_replicate` may be above 1.
            job: what the training asks for.
            sync_every: inner steps between two outer steps.
            outer_lr: learning rate of the outer SGD.
            outer_momentum: its Nesterov momentum.
        """
        super().__init__(stage, grid, job, sync_every=sync_every)
        self._outer = {name: nn.Parameter(p.detach().clone()) for name, p in self.trainable.items()}
        self._outer_optimizer = torch.optim.SGD(
            self._outer.values(), lr=outer_lr, momentum=outer_momentum, nesterov=outer_momentum > 0
        )

    def _synchronise(self) -> None:
        """The outer step: every rank takes the same one."""
        for name, outer in self._outer.items():
            outer.grad = outer.detach() - self.trainable[name].detach()
        average([outer.grad for outer in self._outer.values() if outer.grad is not None], self._group)
        self._outer_optimizer.step()
        self._outer_optimizer.zero_grad(set_to_none=True)
        for name, outer in self._outer.items():
            self.trainable[name].detach().copy_(outer.detach())

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The outer one too."""
        return [self.optimizer, self._outer_optimizer]

    def copies(self) -> Iterable[Tensor]:
        """The outer weights."""
        return self._outer.values()

    def state(self) -> dict[str, Tensor]:
        """With the outer weights and their momentum, which are the same on every rank."""
        return super().state() | self._outer_state()

    def _outer_state(self) -> dict[str, Tensor]:
        prime(self._outer_optimizer)
        found = {}
        for name, outer in self._outer.items():
            found[f"own.diloco.outer.{name}"] = outer.detach()
            momentum = self._outer_optimizer.state[outer].get("momentum_buffer")
            if momentum is not None:
                found[f"own.diloco.momentum.{name}"] = momentum
        return found

    def restored(self, step: int, keys: frozenset[str]) -> None:
        """After another strategy the outer weights begin where the model is."""
        super().restored(step, keys)
        for name, outer in self._outer.items():
            if f"own.diloco.outer.{name}" not in keys:
                outer.detach().copy_(self.trainable[name].detach())
