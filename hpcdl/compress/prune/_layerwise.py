"""A decoder's blocks in order, each with the inputs that the changed blocks before it give.

One block's activations and statistics are held at a time, so that what pruning takes beside the model doesn't
grow with its depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from hpcdl.distributed.decoder import blocks, trunk
from hpcdl.errors import HpcdlError


class Seen(Protocol):
    """What is noted of a layer's inputs."""

    def __init__(self, layer: nn.Linear) -> None:
        """Of this layer."""

    def add(self, inputs: Tensor) -> None:
        """Notes inputs `(tokens, columns)`."""


S = TypeVar("S", bound=Seen)


class SquaredNorms:
    """Sums of squares of each input over all tokens."""

    def __init__(self, layer: nn.Linear) -> None:
        self.sums = torch.zeros(layer.in_features, dtype=torch.float64, device=layer.weight.device)

    def add(self, inputs: Tensor) -> None:
        """Notes inputs `(tokens, columns)`."""
        wide = inputs if inputs.dtype == torch.float64 else inputs.float()
        self.sums += wide.square().sum(0)

    def norms(self) -> Tensor:
        """‖X_j‖₂, `(columns,)` fp32."""
        return self.sums.sqrt().float()


class Hessian:
    """H = 2·X·Xᵀ / tokens, of a layer's squared output error."""

    def __init__(self, layer: nn.Linear) -> None:
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        size = layer.in_features
        self.sums = torch.zeros(size, size, dtype=wide, device=layer.weight.device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Notes inputs `(tokens, columns)`."""
        self.tokens += len(inputs)
        wide = inputs.to(self.sums.dtype)
        self.sums.addmm_(wide.T, wide)

    @property
    def hessian(self) -> Tensor:
        """`(columns, columns)`; the mean over tokens, since only its shape counts."""
        return self.sums * (2.0 / max(1, self.tokens))


class Walk(Generic[S]):
    """The hidden states of all calibration batches, on their way from block to block."""

    def __init__(self, model: Any, text: Sequence[Mapping[str, Tensor]]) -> None:
        """Runs the embedding, and notes what else each block is given.

        Raises:
            HpcdlError: the model's blocks aren't called as this needs.
        """
        self.blocks = list(blocks(trunk(model)))
        self.hidden: list[Tensor] = []
        self.given: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in self.blocks]
        self.real = [batch["real"] for batch in text]
        device = next(model.parameters()).device
        with ExitStack() as stack:
            for number, block in enumerate(self.blocks):
                stack.enter_context(_stand_in(block, self._note(number)))
            for batch in text:
                trunk(model)(
                    input_ids=batch["input_ids"].to(device),
                    position_ids=batch["position_ids"].to(device),
                    use_cache=False,
                )
        if len(self.hidden) != len(text) or any(len(given) != len(text) for given in self.given):
            raise HpcdlError(
                f"{type(model).__name__} does not run its blocks one after the other, as pruning block by block"
                " needs: prune=magnitude or prune=obd"
            )

    def _note(self, number: int) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, *more: Any, **named: Any) -> Tensor:
            if number == 0:
                self.hidden.append(hidden)
            self.given[number].append((more, named))
            return hidden

        return forward

    def look(self, number: int, layers: Mapping[str, nn.Linear], kind: type[S]) -> dict[str, S]:
        """Runs a block, and returns what was seen of each of its layers' inputs."""
        seen = {name: kind(layer) for name, layer in layers.items()}
        current: list[Tensor] = []

        def listener(name: str) -> Callable[..., None]:
            def listen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x, real = inputs[0], current[0].to(inputs[0].device)
                with torch.autocast(x.device.type, enabled=False):
                    seen[name].add(x[real] if x.shape[:2] == real.shape else x.flatten(0, -2))

            return listen

        hooks = [layer.register_forward_pre_hook(listener(name)) for name, layer in layers.items()]
        try:
            for at, real in enumerate(self.real):
                current[:] = [real]
                self._run(number, at)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def go_on(self, number: int) -> None:
        """Runs a block, and takes what comes out for the next."""
        for at in range(len(self.hidden)):
            self.hidden[at] = self._run(number, at)

    def _run(self, number: int, at: int) -> Tensor:
        more, named = self.given[number][at]
        out = self.blocks[number](self.hidden[at], *more, **named)
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden


class _stand_in:
    """Another forward pass in a block's place, for a while."""

    def __init__(self, block: nn.Module, forward: Callable[..., Tensor]) -> None:
        self._block = block
        self._forward = forward

    def __enter__(self) -> None:
        self._block.forward = self._forward

    def __exit__(self, *_: object) -> None:
        del self._block.forward


@torch.no_grad()
def in_order(
    model: nn.Module,
    text: Sequence[Mapping[str, Tensor]],
    kind: type[S],
    prune: Callable[[nn.Linear, S], None],
) -> None:
    """Prunes all linear layers of each block, from the first block to the last.

    Under autocast only the blocks' own passes are in fewer bits: statistics and solvers stay in fp32.

    Args:
        model: transformers' causal language model; its mode is kept, dropout is off meanwhile.
        text: calibration batches (hpcdl.compress.prune).
        kind: what is noted of a layer's inputs.
        prune: changes a layer, given what was noted.

    Raises:
        HpcdlError: there is no text, or the model has no blocks to go through.
    """
    if not text:
        raise HpcdlError("pruning with calibration needs text: no batch was given")
    training = model.training
    model.eval()
    try:
        walk: Walk[S] = Walk(model, text)
        for number, block in enumerate(walk.blocks):
            layers = {name: part for name, part in block.named_modules() if isinstance(part, nn.Linear)}
            seen = walk.look(number, layers, kind)
            for name, layer in layers.items():
                with torch.autocast(layer.weight.device.type, enabled=False):
                    prune(layer, seen.pop(name))
            walk.go_on(number)
    finally:
        model.train(training)
