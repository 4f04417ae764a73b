"""Inputs of recomputing blocks wait on a disk: the same training, with less of it in memory."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from hpcdl.distributed.parking import SMALL, Lot, Place, parking
from hpcdl.errors import HpcdlError
from tests.worker.conftest import Workers

pytestmark = pytest.mark.torch

FULL = {"trainer__activation_checkpointing": "full"}
DISK = {**FULL, "trainer__activation_offload": "disk"}


@pytest.mark.parametrize(
    ("ranks", "case"),
    [(1, {}), (1, {"trainer__precision": "bf16", "peft__name": "lora"}), (2, {"parallel__name": "fsdp"})],
)
def test_training_is_the_same(workers: Workers, ranks: int, case: dict[str, object]) -> None:
    kept, parked = workers.train(ranks, **FULL, **case), workers.train(ranks, **DISK, **case)
    assert parked.losses() == kept.losses()
    assert parked.evaluations() == kept.evaluations()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_what_is_parked_comes_back(dtype: torch.dtype) -> None:
    lot = Lot()
    tensor = (torch.randn(96, 512) * 100).to(dtype)
    views = {"whole": tensor, "turned": tensor.T, "part": tensor[7:, ::2].expand(2, -1, -1)}
    places = {name: lot.park(view) for name, view in views.items()}
    assert all(isinstance(place, Place) for place in places.values())
    for name, view in views.items():
        assert torch.equal(lot.fetch(places[name]), view)


def test_small_ones_and_parameters_stay() -> None:
    lot = Lot()
    small, parameter = torch.zeros(SMALL, dtype=torch.uint8), torch.nn.Parameter(torch.zeros(SMALL))
    assert lot.park(small) is small
    assert lot.park(parameter) is parameter


def test_places_are_used_again() -> None:
    """A second pass, and one that nobody goes back, take no more of the disk."""
    where = parking("disk", torch.device("cpu"))
    weight, ends = torch.randn(256, 256, requires_grad=True), []
    lot = where.pack_hook.__self__  # type: ignore[attr-defined]
    for backward in (True, False, True):
        with where:
            hidden = torch.randn(64, 256)
            for _ in range(4):
                hidden = torch.tanh(hidden @ weight)
        if backward:
            hidden.sum().backward()
        del hidden
        ends.append(os.fstat(lot._file.fileno()).st_size)
    assert ends[0] > 4 * 64 * 256 * 4
    assert ends == ends[:1] * 3


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(HpcdlError, match=r"activation_offload=disk: .*No space left .*TMPDIR"):
        Lot().park(torch.zeros(100_000))
