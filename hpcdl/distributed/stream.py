"""Full-parameter training with a layer in memory at a time: hpcdl/compress/offload/stream.py says why and whence.

A step of all micro-batches together, layer by layer:

accumulate   embedding, then each layer forward; what stays is each layer's input. Norm, head, loss.
step         head, norm, then each layer from the last: forward again, backward, its gradient summed over the
             micro-batches, the optimizer's step on it, back to the shelf. The embedding last; where it is the head
             too, that one's part of its gradient is made only now.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpcdl.distributed.decoder import Stage, inner, is_tied, trunk
from hpcdl.distributed.engine import Batch, Engine, squares
from hpcdl.distributed.losses import IGNORE
from hpcdl.distributed.mesh import Grid
from hpcdl.distributed.parallelize import Job
from hpcdl.distributed.residence import Residence
from hpcdl.distributed.slices import SlicedHead
from hpcdl.distributed.update import Update
from hpcdl.errors import HpcdlError


@dataclass(slots=True)
class Forward:
    """What the backward pass of a step needs."""

    batches: Sequence[Batch]
    inputs: list[list[Tensor]]
    """Of each layer by micro-batch, `(rows, seq, width)`; after the last layer's, what it gave."""
    calls: list[list[dict[str, Any]]]
    """What each layer is called with besides, by micro-batch and layer."""
    states: Tensor
    """What the head is given at target positions, of all micro-batches, `(tokens, width)`."""
    labels: Tensor
    """`(tokens,)`."""
    norm: Tensor
    """As SlicedHead.loss gives it."""


class Recorder(nn.Module):
    """Stands in a layer's place: tells what the model calls it with, and hands hidden states on."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.call: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **call: Any) -> Tensor:
        """Takes note."""
        self.hidden, self.call = hidden, call
        return hidden

    def take(self) -> tuple[Tensor, dict[str, Any]]:
        """What was noted, which is forgotten."""
        hidden, call = self.hidden, self.call
        self.hidden, self.call = None, {}
        assert hidden is not None, "the model has called it"
        return hidden, call


class StreamEngine(Engine):
    """Drives a model that lives on a shelf. Every rank passes the whole model through, its own tokens with it."""

    staged = False

    def __init__(self, residence: Residence, grid: Grid, job: Job, *, keep_on_shelf: bool) -> None:
        """Makes the optimizer's state on the shelf.

        Args:
            residence: the model; every weight is trained.
            grid: this rank's place; only `dp_replicate` may be above 1.
            job: what the training asks for.
            keep_on_shelf: whether the layers' inputs wait there for the backward pass.

        Raises:
            HpcdlError: the model isn't one that can be passed through so.
        """
        stage = Stage(residence.model)
        refuse_others(stage)
        super().__init__([stage], grid, job.make_optimizer, autocast=job.autocast)
        # `optimizer` never steps: it would want all gradients at once.
        self._residence = residence
        self._shelf = residence.shelf
        self._base = trunk(residence.model)
        self._layers: list[nn.Module] = list(self._base.layers)
        self._recorders = nn.ModuleList([Recorder() for _ in self._layers])
        self._homes = {name: residence.home(p) for name, p in self.trainable.items()}
        self._name_of = {id(p): name for name, p in self.trainable.items()}
        self._update = Update(residence, job, self._homes)
        self._tied = is_tied(residence.model)
        self._head_name = self._name_of[id(stage.head().weight)]
        self._head = SlicedHead(residence, self._homes[self._head_name])
        self._at_once = max(1, job.micro_batches * (len(self._layers) + 1) // 4)
        self._kept: dict[tuple[int, int], Tensor] | None = {} if keep_on_shelf else None
        self._under: Forward | None = None
        self._targets = 1
        self._square = 0.0

    # --- a step -------------------------------------------------------------------------------------------

    def accumulate(self, batches: Sequence[Batch], targets: int) -> Tensor:
        """The forward pass; the backward pass is `step`, which knows what the gradients are for."""
        self._targets = targets
        with torch.no_grad():
            hidden, inputs, calls = self._forward_layers(batches, keep=True)
            states, labels = self._states(hidden, batches)
            total, norm = self._head.loss(states, labels)
        self._under = Forward(batches, [*inputs, hidden], calls, states, labels, norm)
        return total

    def step(self, learning_rate: float, max_norm: float | None) -> float:
        """The backward pass, with each layer's update in it; twice where the norm is to be clipped.

        Returns:
            The norm of the whole gradient before clipping; the same on every rank.
        """
        assert self._under is not None, "accumulate comes first"
        self._shelf.settle()
        factor = 1.0
        if max_norm is not None:
            norm = self._backward(self._under)
            factor = max_norm / (norm + 1e-6) if norm > max_norm else 1.0
        self._update.begin(learning_rate, factor)
        norm = self._backward(self._under)
        self._update.end()
        self._under = None
        return norm

    def _forward_layers(
        self, batches: Sequence[Batch], *, keep: bool
    ) -> tuple[list[Tensor], list[list[Tensor]], list[list[dict[str, Any]]]]:
        """What the last layer gives, each layer's inputs where they are kept, and how it is called."""
        hidden, calls = map(list, zip(*(self._enter(batch) for batch in batches), strict=True))
        inputs: list[list[Tensor]] = []
        for number, layer in enumerate(self._layers):
            if keep:
                inputs.append([self._keep(number, micro, state) for micro, state in enumerate(hidden)])
            with self._residence.visiting(layer, self._layers[number + 1 : number + 2]):
                for micro, state in enumerate(hidden):
                    hidden[micro] = self._run(layer, state, calls[micro][number])
        return hidden, inputs, calls

    def _enter(self, batch: Batch) -> tuple[Tensor, list[dict[str, Any]]]:
        """Embedded tokens, and what the model would call each layer with."""
        whole, self._base.layers = self._base.layers, self._recorders
        try:
            with self.context():
                self._base(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        finally:
            self._base.layers = whole
        made = [recorder.take() for recorder in self._recorders if isinstance(recorder, Recorder)]
        return made[0][0], [call for _, call in made]

    def _run(self, layer: nn.Module, hidden: Tensor, call: dict[str, Any]) -> Tensor:
        with self.context():
            out = layer(hidden, **call)
        result: Tensor = out[0] if isinstance(out, tuple) else out  # transformers 5.0 gives a tuple
        return result

    def _keep(self, number: int, micro: int, state: Tensor) -> Tensor:
        if self._kept is None:
            return state
        place = self._kept.get((number, micro))
        if place is None or place.shape != state.shape or place.dtype != state.dtype:
            place = self._kept[number, micro] = self._shelf.new(state.shape, state.dtype)
        self._shelf.write(place, state.cpu())
        return place

    def _states(self, hidden: Sequence[Tensor], batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """What the head is given, at target positions, of all micro-batches one after the other."""
        with self._residence.visiting(self._base.norm):
            states = [self._normed(*pair) for pair in zip(hidden, batches, strict=True)]
        return torch.cat(states), torch.cat([b["labels"][b["labels"] != IGNORE] for b in batches])

    def _normed(self, hidden: Tensor, batch: Batch) -> Tensor:
        with self.context():
            rows: Tensor = self._base.norm(hidden)[batch["labels"] != IGNORE]
        return rows.to(torch.bfloat16) if self.autocast else rows

    # --- the way back -------------------------------------------------------------------------------------

    def _backward(self, forward: Forward) -> float:
        """All gradients, each handed to `_take`; returns their norm."""
        self._square = 0.0
        scale = 1.0 / self._targets

        def rows(first: int, last: int, gradient: Tensor) -> None:
            self._take(self._head_name, first, gradient.mul_(scale))

        back = self._head.gradient(forward.states, forward.labels, forward.norm, None if self._tied else rows)
        assert back is not None
        flows = self._back_through_norm(forward, back.mul_(scale))
        del back
        for number in reversed(range(len(self._layers))):
            layer = self._layers[number]
            with self._residence.visiting(layer, self._layers[max(0, number - 1) : number]):
                gradients = self._back_through(layer, forward, number, flows)
                for parameter in layer.parameters():
                    self._take(self._name_of[id(parameter)], 0, gradients.pop(id(parameter)))
        self._back_through_embedding(forward, flows, scale)
        self._shelf.settle()
        return math.sqrt(self._square)

    def _back_through_norm(self, forward: Forward, back: Tensor) -> list[Tensor]:
        """Gradients of what the last layer gave, by micro-batch."""
        counts = [int((b["labels"] != IGNORE).sum()) for b in forward.batches]
        norm, flows = self._base.norm, []
        with self._residence.visiting(norm):
            sums = Sums(norm)
            for hidden, batch, mine in zip(
                forward.inputs[-1], forward.batches, torch.split(back, counts), strict=True
            ):
                leaf = hidden.detach().requires_grad_()
                with torch.enable_grad():
                    states = self._normed(leaf, batch)
                flows.append(_back(states, mine, leaf))
                sums.add()
            gradients = sums.take()
            for parameter in norm.parameters():
                self._take(self._name_of[id(parameter)], 0, gradients[id(parameter)])
        return flows

    def _back_through(
        self, layer: nn.Module, forward: Forward, number: int, flows: list[Tensor]
    ) -> dict[int, Tensor]:
        """A layer's gradients over all micro-batches; `flows` become those of its inputs."""
        sums = Sums(layer)
        for micro, flow in enumerate(flows):
            kept = forward.inputs[number][micro]
            leaf = kept.to(self.device).detach().requires_grad_()
            with torch.enable_grad():
                out = self._run(layer, leaf, forward.calls[micro][number])
            flows[micro] = _back(out, flow, leaf)
            self._shelf.release(kept)
            sums.add(last=micro == len(flows) - 1)
        return sums.take()

    def _back_through_embedding(self, forward: Forward, flows: list[Tensor], scale: float) -> None:
        """The embedding's gradient, slice by slice; with the head's where they are one weight."""
        embedding: Any = self._base.embed_tokens
        name = self._name_of[id(embedding.weight)]
        ids = torch.cat([batch["input_ids"].flatten() for batch in forward.batches])
        flow = torch.cat([part.reshape(-1, part.shape[-1]) for part in flows])
        flows.clear()
        kept = torch.ones_like(ids, dtype=torch.bool)
        if embedding.padding_idx is not None:
            kept = ids != embedding.padding_idx  # as torch's own

        def rows(first: int, last: int, gradient: Tensor) -> None:
            here = kept & (ids >= first) & (ids < last)
            gradient.mul_(scale).index_add_(0, ids[here] - first, flow[here].to(gradient.dtype))
            self._take(name, first, gradient)

        if self._tied:
            self._head.gradient(forward.states, forward.labels, forward.norm, rows, to_states=False)
            return
        home = self._homes[name]
        for first, last in SlicedHead(self._residence, home).slices():
            rows(first, last, torch.zeros(last - first, home.shape[1], device=self.device))
            self._shelf.release(home[first:last])

    def _take(self, name: str, first: int, gradient: Tensor) -> None:
        """Some rows' whole gradient: counts it, and has them updated where it is time."""
        if self.grid.dims.world_size > 1:
            gradient = gradient.float()
            dist.all_reduce(gradient, group=self.grid.gradient_group)
        self._square += squares(gradient)
        if self._update.under_way:
            self._update.rows(name, first, gradient)

    # --- the rest of an engine ----------------------------------------------------------------------------

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Layer by layer too, as many batches together as take no more memory than a step does."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.stages.eval()
        with torch.no_grad():
            for at in range(0, len(batches), self._at_once):
                some = batches[at : at + self._at_once]
                hidden, _, _ = self._forward_layers(some, keep=False)
                total += self._head.loss(*self._states(hidden, some))[0]
        self.stages.train()
        return total

    def state(self) -> dict[str, Tensor]:
        """The shelf's own tensors."""
        return {
            **{f"model.{name}": home for name, home in self._homes.items()},
            **self._update.state(),
        }

    def let_go(self, tensor: Tensor) -> None:
        """Lets its pages go."""
        self._shelf.release(tensor)

    def restored(self, step: int, keys: frozenset[str]) -> None:
        """Tells the optimizer how many steps its state is of."""
        self._update.steps = step

    def report(self) -> dict[str, float]:
        """Size of the working file."""
        return {"offload_bytes": self._shelf.bytes}


class Sums:
    """A module's gradients, added up over backward passes; in fp32 where there are several."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = list(module.parameters())
        self._sums: dict[int, Tensor] = {}

    def add(self, *, last: bool = False) -> None:
        """Takes what a backward pass has left on the parameters.

        Args:
            last: no other follows.
        """
        for parameter in self._parameters:
            grad, key = parameter.grad, id(parameter)
            parameter.grad = None
            if grad is None:
                continue
            if key in self._sums:
                self._sums[key] += grad
            else:
                self._sums[key] = grad if last else grad.float()

    def take(self) -> dict[int, Tensor]:
        """By the parameter's id; zeros where none came."""
        return {
            id(p): self._sums[id(p)] if id(p) in self._sums else torch.zeros_like(p) for p in self._parameters
        }


def refuse_others(stage: Stage) -> None:
    """Raises where a model is more than embedding, layers, norm and a plain head, or draws random numbers."""
    kind = inner(stage.model).config.model_type
    if not stage.has_plain_head():
        raise HpcdlError(f"offload=stream: {kind}'s head is more than a matrix; offload=none")
    if not all(parameter.requires_grad for parameter in stage.parameters()):
        raise HpcdlError("offload=stream trains every weight, and some are frozen; offload=none")
    dropout = getattr(inner(stage.model).config, "attention_dropout", 0.0)
    if dropout or any(isinstance(m, nn.Dropout) and m.p > 0 for m in stage.modules()):
        raise HpcdlError(
            f"offload=stream: {kind} has dropout, and a layer that is computed twice would draw twice: "
            "set attention_dropout to 0 in its config.json, or offload=none"
        )


def _back(out: Tensor, flow: Tensor, leaf: Tensor) -> Tensor:
    """The gradient of `leaf`, and those of parameters left on them."""
    torch.autograd.backward([out], [flow.to(out.dtype)])
    assert leaf.grad is not None
    return leaf.grad
