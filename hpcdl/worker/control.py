"""The one collective a step besides the gradients': every rank's small numbers, seen by all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpcdl.errors import HpcdlError


def gather(values: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Every rank's `values`, `(ranks, len(values))`, fp64, on the CPU.

    Gathered rather than reduced: sums over the rows come out bit for bit the same on every rank.
    """
    mine = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).cpu()


def agree_on_start(step: int, parameters: Sequence[nn.Parameter], device: torch.device) -> int:
    """Rank 0's `step`, after checking that all ranks start from the same trainable weights.

    Raises:
        HpcdlError: they don't (a folder that differs from node to node).
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for number, parameter in enumerate(parameters, start=1):
        total += number * parameter.detach().sum(dtype=torch.float64)
    everyone = gather([float(step), total], device)
    # Sums of the same numbers in the same order on the same kind of device: equal up to the last digits.
    sums = everyone[:, 1]
    odd = (~torch.isclose(sums, sums[0], rtol=1e-6, atol=1e-6)).nonzero().flatten().tolist()
    if odd:
        raise HpcdlError(
            f"ranks {odd} start from other weights than rank 0: is model.path the same on every node?"
        )
    return int(everyone[0, 0])
