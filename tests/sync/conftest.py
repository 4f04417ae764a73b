"""A server, and one sending process for all tests of a file: importing wandb takes it seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcdl.sync.courier import Courier
from tests import fake_wandb
from tests.fake_wandb import FakeWandb


@pytest.fixture(scope="module")
def wandb_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user with a key, and no settings or netrc of the machine's."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CACHE", "CONFIG", "DATA"):
            patch.setenv(f"WANDB_{name}_DIR", str(home / name))
        patch.setenv("NETRC", str(home / "netrc"))
        patch.setenv("WANDB_API_KEY", fake_wandb.KEY)
        yield home


@pytest.fixture(scope="module")
def the_server(wandb_home: Path) -> Iterator[FakeWandb]:
    pytest.importorskip("wandb")
    with fake_wandb.serving() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_BASE_URL", server.url)
        yield server


@pytest.fixture
def server(the_server: FakeWandb) -> Iterator[FakeWandb]:
    """A server that works, with no run."""
    yield the_server
    the_server.let_go.set()
    the_server.__dict__.update({**FakeWandb().__dict__, "url": the_server.url})


@pytest.fixture(scope="module")
def courier(the_server: FakeWandb) -> Iterator[Courier]:
    made = Courier(the_server.url)
    yield made
    made.close()


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs"
