"""What the training loop drives: a model under a strategy, whatever that is.

The loop gives an engine this rank's micro-batches and gets the loss back; how ranks share the work, when
they talk and where the optimizer lives is the engine's own business. `Engine` here is the synchronous one
for every mesh without pipeline stages; other engines (hpcdl.distributed.pipeline, local, server, …)
inherit from it and change what differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpcdl.distributed.decoder import named_parameters
from hpcdl.distributed.mesh import Grid

Batch = dict[str, Tensor]
"""`input_ids`, `position_ids`, `labels`, each `(rows, seq_len)`."""

MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
"""Makes the experiment's optimizer over some parameters."""

Watch = Callable[[Iterable[Tensor]], AbstractContextManager[Any]]
"""What another thread's work is put into while a step's memory is measured; takes tensors that came from elsewhere."""


def unwatched(tensors: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Nobody measures."""
    return nullcontext()


class Engine:
    """A model under a strategy. Methods are called by all ranks together unless they say otherwise."""

    lag = 0
    """Steps by which the ranks may be apart: the loop hears of step k when it has done step k + lag."""

    period = 1
    """Steps from one synchronisation of the ranks to the next: what they send is measured over as many."""

    work = 1.0
    """This rank's share of a step's computing by construction, in any unit: ranks are told apart by it, and slow
    ones from those that have more to do."""

    updates = 1
    """Optimizer steps in one of the loop's."""

    staged = True
    """Whether a checkpoint is copied in memory before it is written: else training waits for the writing."""

    def __init__(
        self, stages: Sequence[nn.Module], grid: Grid, make_optimizer: MakeOptimizer, *, autocast: bool
    ) -> None:
        """Takes wrapped stages.

        Args:
            stages: this rank's Stages under whatever wraps them; one but for pipelines.
            grid: this rank's place.
            make_optimizer: makes the optimizer over this rank's trainable parameters.
            autocast: whether passes run in bf16.
        """
        self.stages = nn.ModuleList(stages)
        self.grid = grid
        self.device = grid.device
        self.autocast = autocast
        self.trainable = _trainable(stages)
        """This rank's trained parameters by the names that they have in the whole model."""
        self.optimizer = make_optimizer(list(self.trainable.values()))
        self.is_whole = grid.dims.world_size == grid.dims.dp_replicate
        """Whether every rank still holds the whole model, as transformers made it."""
        self.reports = grid.rank("tp") == 0
        """Whether this rank's losses count: ranks that share a matrix have the same ones."""

    # --- a step -------------------------------------------------------------------------------------------

    def accumulate(self, batches: Sequence[Batch], targets: int) -> Tensor:
        """Forward and backward passes of this rank's share of the global batch.

        Afterwards the gradients are those of the mean over all targets of the global batch.

        Args:
            batches: this rank's micro-batches.
            targets: target tokens of the whole global batch.

        Returns:
            This rank's part of the summed loss, an fp64 scalar; all ranks' parts make up the whole.
        """
        # Gradients are averaged over the ranks that have other tokens; the mean over tokens wants their sum.
        scale = self.grid.dims.gradient_ranks / targets
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches, start=1):
            with self._synchronising(last=number == len(batches)):
                with self.context():
                    loss = self._forward(batch)
                (loss * scale).backward()  # type: ignore[no-untyped-call]
            total += loss.detach().reshape(())
            del loss  # with it goes what is left of its graph: not beside the next one's
        return total if self.reports else torch.zeros_like(total)

    def step(self, learning_rate: float, max_norm: float | None) -> float:
        """Clips the gradients, takes the optimizer's step and clears the gradients.

        Returns:
            The norm of the whole model's gradient before clipping; the same on every rank.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        settle(self.trainable.values())
        norm = self.gradient_norm()
        clip(self.trainable.values(), norm, max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def gradient_norm(self) -> float:
        """Norm of the whole model's gradient, each element counted once, summed in fp64."""
        dims = self.grid.dims
        copies = dims.world_size // dims.pp
        grads = [p.grad for p in self.counted() if p.grad is not None]
        square = math.fsum(
            part * shards(grad) / copies for grad, part in zip(grads, all_squares(grads), strict=True)
        )
        if any(shards(p) > 1 for p in self.trainable.values()) or dims.pp > 1:
            square = add_up(square, self.device)
        else:
            square *= copies  # every rank has the same whole gradient
        return math.sqrt(square)

    def counted(self) -> Iterable[nn.Parameter]:
        """The parameters whose gradients make up the norm: all, but copies of one weight once."""
        return self.trainable.values()

    # --- evaluation ---------------------------------------------------------------------------------------

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """This rank's part of the summed loss, an fp64 scalar; the same number of batches on every rank."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.stages.eval()
        with torch.no_grad(), self.context():
            for batch in batches:
                total += self._forward(batch).reshape(())
        self.stages.train()
        return total if self.reports else torch.zeros_like(total)

    # --- state --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by names that don't depend on the strategy.

        `model.<name>` and `optimizer.<name>.<key>`: this rank's live tensors (DTensors where they are
        sharded), so that a checkpoint is loaded in place. What only this strategy needs is called
        `own.…`: others leave it out, and this one can begin without it.

        A checkpoint is copied from it while training goes on: what anything but this rank's own `step`
        changes is to be given as a copy.
        """
        return live_state(self.trainable, self.optimizer)

    def restored(self, step: int, keys: frozenset[str]) -> None:
        """Called after a checkpoint was loaded into `state()`.

        Args:
            step: the step that it was saved at.
            keys: the names that it had; `own.…` of another strategy or world size are not among them.
        """
        set_steps(self.optimizer, step * self.updates)

    def let_go(self, tensor: Tensor) -> None:
        """A tensor of `state()` has been written or read, and is not looked at for now; this rank alone."""

    # --- what it measured ---------------------------------------------------------------------------------

    def norm_of(self, norms: Tensor) -> float:
        """A step's gradient norm from what `step` returned on each rank, `(ranks,)`; any rank alone."""
        return float(norms[0])

    def report(self) -> dict[str, float]:
        """What only this strategy measures, for metrics.jsonl and result.json; rank 0 alone."""
        return {}

    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """Those whose state this rank keeps."""
        return [self.optimizer]

    def copies(self) -> Iterable[Tensor]:
        """Further copies of weights that this rank keeps, beside the model's own."""
        return ()

    def watch(self, watching: Watch) -> None:
        """Says what other threads' work on tensors is to be put into from here on."""

    # --- the parts that other engines change --------------------------------------------------------------

    def context(self) -> AbstractContextManager[Any]:
        """bf16 autocast, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def close(self) -> None:
        """Ends what the engine has started; the last call."""

    def _forward(self, batch: Batch) -> Tensor:
        """Summed loss `(1,)` of a micro-batch."""
        return cast(
            Tensor,
            self.stages[0](batch["input_ids"], position_ids=batch["position_ids"], labels=batch["labels"]),
        )

    def _synchronising(self, *, last: bool) -> AbstractContextManager[Any]:
        """Holds back what need not be sent before the last micro-batch."""
        stage: Any = self.stages[0]
        if hasattr(stage, "set_requires_all_reduce"):  # FSDP: the copies are added up once
            stage.set_requires_all_reduce(last)
        no_sync = getattr(stage, "no_sync", None)
        return nullcontext() if last or no_sync is None else cast(AbstractContextManager[Any], no_sync())


def _trainable(stages: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for stage in stages
        for name, parameter in named_parameters(stage).items()
        if parameter.requires_grad
    }


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; other tensors as they are."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shards(tensor: Tensor) -> int:
    """Into how many parts a DTensor is split over ranks; 1 for other tensors."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(
        mesh.size(i) for i, placement in enumerate(tensor.placements) if not placement.is_replicate()
    )


def squares(tensor: Tensor) -> float:
    """Sum of squares of this rank's part, in fp64."""
    part = local(tensor)
    return float(torch.linalg.vector_norm(part, dtype=torch.float64).square()) if part.numel() else 0.0


def all_squares(tensors: Sequence[Tensor]) -> list[float]:
    """`squares` of each, bit for bit; a GPU is waited for once."""
    parts = [local(tensor) for tensor in tensors]
    if not parts or not all(part.numel() for part in parts):
        return [squares(part) for part in parts]
    norms = torch._foreach_norm(parts, 2, dtype=torch.float64)
    return cast("list[float]", torch.stack(norms).square().tolist())


def add_up(value: float, device: torch.device) -> float:
    """Sum over all ranks, the same to the last bit on each."""
    mine = torch.tensor([value], dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return math.fsum(float(part) for part in everyone)


def settle(parameters: Iterable[nn.Parameter]) -> None:
    """Adds up gradients that are still partial sums over ranks: norms' weights under sequence parallel.

    They are many and small: one all-reduce takes all of them.
    """
    from torch.distributed.tensor import DTensor

    sums: dict[Any, list[DTensor]] = {}
    for parameter in parameters:
        grad = parameter.grad
        if not isinstance(grad, DTensor) or not isinstance(parameter, DTensor):
            continue
        if grad.placements == parameter.placements:
            continue
        if len(grad.placements) == 1 and grad.placements[0].is_partial() and shards(parameter) == 1:
            sums.setdefault((grad.device_mesh, grad.dtype), []).append(parameter)
        else:
            parameter.grad = grad.redistribute(placements=parameter.placements)
    for (mesh, _), alike in sums.items():
        flat = torch.cat([cast(DTensor, p.grad).to_local().flatten() for p in alike])
        dist.all_reduce(flat, group=mesh.get_group())
        for p, whole in zip(alike, torch.split(flat, [p.numel() for p in alike]), strict=True):
            p.grad = DTensor.from_local(whole.view(p.shape), mesh, p.placements, run_check=False)


def clip(parameters: Iterable[nn.Parameter], norm: float, max_norm: float | None) -> None:
    """Scales gradients down to `max_norm`, as torch.nn.utils.clip_grad_norm_ does."""
    if max_norm is None or norm <= max_norm:
        return
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(grads, max_norm / (norm + 1e-6))


def live_state(named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and their optimizer's state by the names of `Engine.state`: the very tensors."""
    prime(optimizer)
    found: dict[str, Tensor] = {}
    for name, parameter in named.items():
        found[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            if key != "step":
                found[f"optimizer.{name}.{key}"] = value
    return found


def set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Tells the optimizer how many steps its state is of."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(float(steps))


def staleness_report(updates: float, total: float, most: float) -> dict[str, float]:
    """What an asynchronous engine reports: mean and maximum over all updates so far.

    Args:
        updates: how many there were.
        total: the sum of their staleness.
        most: its maximum.
    """
    return {"staleness_mean": round(total / max(1.0, updates), 4), "staleness_max": int(most)}


def prime(optimizer: torch.optim.Optimizer) -> None:
    """Has the optimizer make its state before its first step, all zeros, so that there is something to load."""
    if optimizer.state:
        return
    # With a rate of 0 and no gradient, the step changes no weight.
    kept = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter, _ in kept:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, grad in kept:
        parameter.grad = grad
        for value in optimizer.state[parameter].values():
            if isinstance(value, Tensor):
                value.zero_()
