"""A model whose weights lie on a shelf: its modules come in when they are called, and go when they are done.

On a CPU a weight is the shelf's own tensor, and going means that its pages are let go. For a GPU the weights
of a module are copied to it, and the copies dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpcdl.distributed.decoder import inner, named_parameters, trunk
from hpcdl.distributed.shelf import Shelf


class Residence:
    """Knows where each parameter lies, and has the model's parts come and go as they are called."""

    def __init__(self, model: Any, shelf: Shelf, device: torch.device, *, read_ahead: bool) -> None:
        """Puts hooks on the parts of a model whose parameters are the shelf's tensors.

        Args:
            model: transformers' causal language model.
            shelf: has its parameters.
            device: where it computes.
            read_ahead: whether `visiting` asks the disk for what comes next.
        """
        self.model = model
        self.shelf = shelf
        self.device = device
        self.copies = device.type != "cpu"
        """Whether a module that computes has copies of its weights."""
        self._read_ahead = read_ahead
        self.homes = {name: parameter.detach() for name, parameter in named_parameters(model).items()}
        """The shelf's tensors by the names that they have in the model, tied ones once."""
        self._home_of = {id(p): self.homes[name] for name, p in named_parameters(model).items()}
        self._guests: dict[nn.Module, int] = {}
        base = trunk(model)
        for part in (base.embed_tokens, *base.layers, base.norm, inner(model).get_output_embeddings()):
            part.register_forward_pre_hook(self._come)
            part.register_forward_hook(self._go, always_call=True)
        if self.copies:
            for name, buffer in list(model.named_buffers()):  # rotary frequencies: small, and always wanted
                owner = model.get_submodule(name.rpartition(".")[0])
                owner._buffers[name.rpartition(".")[2]] = buffer.to(device)

    def home(self, parameter: nn.Parameter) -> Tensor:
        """The shelf's tensor that a parameter is."""
        return self._home_of[id(parameter)]

    @contextmanager
    def visiting(self, part: nn.Module, coming: Iterable[nn.Module] = ()) -> Iterator[None]:
        """A part is in use for a while: calls of it within come and go for nothing.

        Args:
            part: whose weights are needed.
            coming: what will be asked for next.
        """
        if self._read_ahead:
            for module in coming:
                for parameter in module.parameters():
                    self.shelf.expect(self._home_of[id(parameter)])
        self._come(part)
        try:
            yield
        finally:
            self._go(part)

    def _come(self, part: nn.Module, *_: Any) -> None:
        guests = self._guests.get(part, 0)
        self._guests[part] = guests + 1
        if not guests and self.copies:
            for parameter in part.parameters():
                parameter.data = self._copy(self._home_of[id(parameter)])

    def _go(self, part: nn.Module, *_: Any) -> None:
        self._guests[part] -= 1
        if self._guests[part]:
            return
        for parameter in part.parameters():
            home = self._home_of[id(parameter)]
            if self.copies:
                parameter.data = home
            self.shelf.release(home)

    def here(self, tensor: Tensor) -> Tensor:
        """A tensor of the shelf on the device: itself on a CPU."""
        return self._copy(tensor) if self.copies else tensor

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)
