from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kubernetes.making import Controller, cluster, objects


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Controller]]:
    """Makes the controller of a Job whose workers do what `mode` says."""
    made: list[Controller] = []

    def make(mode: str, *, nodes: int = 2, attempt: int = 0, **fields: Any) -> Controller:
        section = cluster(
            {"wait_for_pods_min": 1.0}, nodes=nodes, processes_per_node=1, env={"MODE": mode}, **fields
        )
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        one = Controller(made=objects(section, attempt=attempt), folder=tmp_path, port=port, mode=mode)
        made.append(one)
        return one

    yield make
    for one in made:
        one.close()
