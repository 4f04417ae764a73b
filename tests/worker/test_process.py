"""A worker's way into the group of processes."""

from __future__ import annotations

from datetime import timedelta

import pytest

from hpcdl.worker import process

pytestmark = pytest.mark.torch


def test_a_restart_in_place_sees_nothing_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun keeps its store: the addresses in it are those of dead workers."""
    import torch.distributed as dist

    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(server.port),
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():
        monkeypatch.setenv(name, value)
    stores = []
    for restart in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        stores.append(process.own_store(process.from_environment()))
    stores[0].set("rank 1", "its address")
    assert stores[0].check(["rank 1"]) and not stores[1].check(["rank 1"])
    stores[1].set_timeout(timedelta(seconds=1))
    stores[1].set("rank 1", "its new address")
    assert stores[1].get("rank 1") == b"its new address"
