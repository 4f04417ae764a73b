"""Where the whole model goes when a run is over."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpcdl.worker.network import _with_room

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(("free", "where"), [(2**20, "cuda"), (2**10, "cpu")])
def test_what_no_gpu_can_hold_stays_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, free: int, where: str
) -> None:
    """A model that was shared out over GPUs is whole in the end, on one rank."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2**30))
    assert _with_room(nn.Linear(64, 64), torch.device("cuda", 0)).type == where
    assert _with_room(nn.Linear(64, 64), torch.device("cpu")).type == "cpu"
