"""The optimizer's steps on weights that lie on the shelf, a piece at a time: `stream`'s engine asks for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hpcdl.distributed.engine import MakeOptimizer, prime
from hpcdl.distributed.parallelize import Job
from hpcdl.distributed.residence import Residence
from hpcdl.spec.streaming import PIECE


class Update:
    """The optimizer's steps, a few rows of a weight at a time, on state that lies on the shelf.

    The optimizer is torch's own, as the experiment asks for it, over one piece after the other, each with its own
    state. That AdamW and SGD treat every number by itself is what allows it.
    """

    def __init__(self, residence: Residence, job: Job, homes: dict[str, Tensor]) -> None:
        self._residence = residence
        self._shelf = residence.shelf
        self._make: MakeOptimizer = job.make_optimizer
        self._homes = homes
        self._seed = job.seed
        self.steps = 0
        """Steps that the state is of."""
        self.under_way = False
        self._rate = self._factor = 0.0
        self._random = torch.Generator(residence.device)
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        self._state = {
            name: {key: self._shelf.new(home.shape, torch.float32) for key in state_keys(self._make)}
            for name, home in homes.items()
        }

    def begin(self, rate: float, factor: float) -> None:
        """From here on, rows are updated.

        Args:
            rate: the learning rate.
            factor: what gradients are multiplied by first.
        """
        self.under_way, self._rate, self._factor = True, rate, factor
        # A function of the step alone: a resumed run rounds as the undisturbed one, and ranks alike.
        self._random.manual_seed(self._seed * 1_000_003 + self.steps)

    def end(self) -> None:
        """The step is over."""
        self.under_way = False
        self.steps += 1

    def rows(self, name: str, first: int, gradient: Tensor) -> None:
        """Updates the rows from `first` on that `gradient` is of."""
        home, state = self._homes[name], self._state[name]
        step = max(1, PIECE // math.prod(gradient.shape[1:]))
        for at in range(0, len(gradient), step):
            part = gradient[at : at + step].float()
            rows = slice(first + at, first + at + len(part))
            self._piece(home[rows], {key: value[rows] for key, value in state.items()}, part)

    def _piece(self, home: Tensor, state: dict[str, Tensor], gradient: Tensor) -> None:
        weight = nn.Parameter(self._own(home).float())
        if self._factor != 1.0:
            gradient.mul_(self._factor)
        weight.grad = gradient
        optimizer = self._optimizer(weight)
        own: dict[str, Tensor] = {key: self._own(value) for key, value in state.items()}
        own["step"] = torch.tensor(float(self.steps), device=weight.device)
        optimizer.state[weight] = own
        optimizer.step()
        for key, place in state.items():
            self._back(place, optimizer.state[weight][key])
        # Nothing of a piece may wait for the garbage collector, which comes once in hundreds of them.
        optimizer.state.clear()
        optimizer.param_groups[0]["params"] = []
        weight.grad = None
        new = weight.detach()
        self._back(home, round_at_random(new, self._random) if home.dtype == torch.bfloat16 else new)

    def _optimizer(self, weight: nn.Parameter) -> torch.optim.Optimizer:
        """The experiment's, over this weight alone; matrices and vectors decay differently."""
        if weight.ndim not in self._optimizers:
            self._optimizers[weight.ndim] = self._make([weight])
        optimizer = self._optimizers[weight.ndim]
        (group,) = optimizer.param_groups
        group["params"], group["lr"] = [weight], self._rate
        return optimizer

    def _own(self, tensor: Tensor) -> Tensor:
        """A copy on the device."""
        here = self._residence.here(tensor)
        return here.clone() if here is tensor else here

    def _back(self, place: Tensor, content: Tensor) -> None:
        self._shelf.write(place, content.cpu())
        self._shelf.release(place)

    def state(self) -> dict[str, Tensor]:
        """By the names of Engine.state."""
        return {
            f"optimizer.{name}.{key}": value
            for name, state in self._state.items()
            for key, value in state.items()
        }


def state_keys(make: MakeOptimizer) -> list[str]:
    """What the optimizer keeps for each number of a weight."""
    weight = nn.Parameter(torch.zeros(2, 3))
    optimizer = make([weight])
    prime(optimizer)
    return [key for key, value in optimizer.state[weight].items() if getattr(value, "shape", ()) == (2, 3)]


def round_at_random(numbers: Tensor, random: torch.Generator) -> Tensor:
    """fp32 → bf16, up or down with the probability that makes it right on average.

    bf16 is fp32's upper half: a random number below 2¹⁶ is added to the lower half, which is then cut off.
    """
    count = numbers.numel()
    drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=numbers.device)
    drawn.random_(-(2**63), None, generator=random)  # four of 16 bits in one draw
    noise = drawn.view(torch.int16)[:count].view(numbers.shape).int() & 0xFFFF
    bits = noise.add_(numbers.view(torch.int32)).bitwise_and_(-0x10000)
    return bits.view(torch.float32).bfloat16()
