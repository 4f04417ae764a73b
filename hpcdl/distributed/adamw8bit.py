"""AdamW with its moments in 8 bits: 2 bytes a trained parameter instead of 8.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022; bitsandbytes' kernel, here
under an optimizer whose state is plain tensors, so that checkpoints hold it bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hpcdl.errors import HpcdlError

BLOCK = 256
"""Numbers that share a scale."""
SMALLEST = 4096
"""Parameters with fewer numbers keep their moments in fp32, as bitsandbytes has it."""


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, 2019); weight decay is decoupled."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """As torch's AdamW.

        Raises:
            HpcdlError: bitsandbytes isn't installed.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        ops()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_zeros(parameter))
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        assert parameter.grad is not None
        common: dict[str, Any] = {
            "beta1": beta1, "beta2": beta2, "beta3": 0.0, "alpha": 0.0, "eps": group["eps"], "step": step,
            "lr": group["lr"], "weight_decay": group["weight_decay"], "gnorm_scale": 1.0,
        }  # fmt: skip
        first, second = state["exp_avg"], state["exp_avg_sq"]
        if first.dtype == torch.uint8:
            ops().optimizer_update_8bit_blockwise(
                optimizer_name="adam", g=parameter.grad, p=parameter, state1=first, state2=second,
                qmap1=signed(parameter.device), qmap2=unsigned(parameter.device),
                absmax1=state["exp_avg_scale"], absmax2=state["exp_avg_sq_scale"], **common,
            )  # fmt: skip
        else:
            ops().optimizer_update_32bit(
                optimizer_name="adam", g=parameter.grad, p=parameter, state1=first, state2=second,
                unorm_vec=None, max_unorm=0.0, param_norm=0.0, **common,
            )  # fmt: skip


def _zeros(parameter: nn.Parameter) -> dict[str, Tensor]:
    """The state before the first step: digits of any value times a scale of zero are zero."""
    device, count = parameter.device, parameter.numel()
    state = {"step": torch.zeros(())}
    small = count < SMALLEST
    for name in ("exp_avg", "exp_avg_sq"):
        dtype = torch.float32 if small else torch.uint8
        state[name] = torch.zeros(parameter.shape, dtype=dtype, device=device)
        if not small:
            state[f"{name}_scale"] = torch.zeros(-(-count // BLOCK), device=device)
    return state


@cache
def ops() -> Any:
    """Operations of bitsandbytes.

    Raises:
        HpcdlError: it isn't installed.
    """
    try:
        import bitsandbytes  # noqa: F401  # registers them
    except ImportError as error:
        raise HpcdlError("optim=adamw8bit needs bitsandbytes: pip install 'hpcdl[quant]'") from error
    return torch.ops.bitsandbytes


@cache
def signed(device: torch.device) -> Tensor:
    """The 256 values of the first moment."""
    return _map(device, signed=True)


@cache
def unsigned(device: torch.device) -> Tensor:
    """The 256 values of the second moment."""
    return _map(device, signed=False)


def _map(device: torch.device, *, signed: bool) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    values: Tensor = create_dynamic_map(signed=signed)  # type: ignore[no-untyped-call]
    return values.to(device)
