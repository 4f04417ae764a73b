"""Optimizer and learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hpcdl.spec import OptimSpec


def build(spec: OptimSpec, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, its 8-bit form or SGD over `parameters`; weight decay on matrices only, norms and biases are left out.

    Fused (but the 8-bit one): one kernel a step, on CPU and CUDA alike. It takes tensors of one kind at a time,
    so parameters that lie on different meshes are in different groups.
    """
    by_kind: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for parameter in parameters:
        by_kind.setdefault((parameter.ndim >= 2, getattr(parameter, "device_mesh", None)), []).append(
            parameter
        )
    groups: list[dict[str, Any]] = [
        {"params": same, "weight_decay": spec.weight_decay if matrices else 0.0}
        for (matrices, _), same in by_kind.items()
    ]
    if spec.name == "sgd":
        # torch has no fused SGD for parameters that are split over ranks
        fused = all(mesh is None for _, mesh in by_kind)
        return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, fused=fused)
    if spec.name == "adamw8bit":
        from hpcdl.distributed.adamw8bit import AdamW8bit

        return AdamW8bit(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps)
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)


def learning_rate(spec: OptimSpec, step: int, max_steps: int) -> float:
    """The rate of step 1 … max_steps: linear warm-up from 0, then the schedule, at its lowest in the last step.

    A pure function of the step: nothing to save, nothing to resume.
    """
    if step <= spec.warmup_steps:
        return spec.lr * step / spec.warmup_steps
    progress = (step - spec.warmup_steps) / max(1, max_steps - spec.warmup_steps)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[spec.schedule]
    if spec.schedule == "constant":
        return spec.lr
    return spec.lr * (spec.min_lr_ratio + (1.0 - spec.min_lr_ratio) * shape)
