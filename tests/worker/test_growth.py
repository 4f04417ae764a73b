"""A process that looks at its own memory: which lines and tensors grow, and what doesn't."""

from __future__ import annotations

import collections
import ctypes
import gc
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcdl.monitor import looking
from hpcdl.monitor.looking import Answer
from hpcdl.worker import alive, growth

HERE = str(Path(__file__).relative_to(Path.cwd()))
_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = _libc.malloc_usable_size.argtypes = [ctypes.c_size_t]


def look(folder: Path, step: Callable[[int], Any], steps: int = 40) -> Answer:
    """What a process says that does `step` again and again."""
    watched = growth.Watched(folder)
    looking.answer_file(folder, os.getpid()).unlink(missing_ok=True)
    gc.collect()
    for number in range(1, 400):
        step(number)
        watched.at(number)
        if number == 20:
            assert looking.ask(folder, os.getpid(), steps)
        if found := looking.read(folder, os.getpid()):
            assert not tracemalloc.is_tracing() and found.first_step == 21 and found.last_step == 21 + steps
            return found
    raise AssertionError("no answer")


def test_a_list_that_grows_is_named_by_its_line(tmp_path: Path) -> None:
    kept = []
    found = look(tmp_path, lambda number: kept.append(bytearray(50_000)))
    line = test_a_list_that_grows_is_named_by_its_line.__code__.co_firstlineno + 2
    part = found.growing[0]
    assert part.where == f"{HERE}:{line}" and part.bytes_per_step == pytest.approx(50_000, rel=0.02)
    assert "kept.append(bytearray(50_000))" in part.what
    assert found.python == pytest.approx(50_000, rel=0.1) and found.took_s > 0


@pytest.mark.slow
def test_a_full_ring_is_not_named(tmp_path: Path) -> None:
    ring: collections.deque[bytearray] = collections.deque(
        (bytearray(50_000) for _ in range(300)), maxlen=300
    )
    found = look(tmp_path, lambda number: ring.append(bytearray(50_000)))
    assert [part for part in found.growing if part.bytes_per_step > 5_000] == []


@pytest.mark.slow
@pytest.mark.skipif(alive._malloc is None, reason="no mallinfo2: glibc 2.33 and later")
def test_memory_that_c_keeps_is_in_use_and_nobodys(tmp_path: Path) -> None:
    found = look(tmp_path, lambda number: _libc.malloc(40_000))
    assert found.malloc_used == pytest.approx(40_000, rel=0.2)
    assert sum(part.bytes_per_step for part in found.growing) < 4_000


def test_nobody_asks_or_listens(tmp_path: Path) -> None:
    assert not looking.ask(tmp_path, 1, 10)
    growth.Watched().at(1)
    growth.Watched(tmp_path / "gone").at(1)
    assert not tracemalloc.is_tracing()


def test_a_look_that_fails_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("not this one")

    monkeypatch.setattr(alive, "Tensors", fail)
    watched = growth.Watched(tmp_path)
    looking.ask(tmp_path, os.getpid(), 10)
    for number in range(1, 30):
        watched.at(number)
    found = looking.read(tmp_path, os.getpid())
    assert found is not None and found.note == "RuntimeError: not this one" and not tracemalloc.is_tracing()


@pytest.mark.slow
def test_a_loaders_worker_counts_what_it_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCDL_BEATS", str(tmp_path))
    monkeypatch.setattr(growth, "_loader", growth.Watched())
    growth.built()
    growth.begin_loader()
    assert looking.ask(tmp_path, os.getpid(), 8)
    for _ in range(20):
        growth.built()
    found = looking.read(tmp_path, os.getpid())
    assert found is not None and (found.first_step, found.last_step) == (1, 9)


def test_the_line_to_blame() -> None:
    package, mine = ("/x/site-packages/torch/nn.py", 1), ("/home/me/train.py", 2)
    own = (str(Path(alive.__file__).with_name("loop.py")), 3)
    assert alive.chosen([package, mine, own]) == "/home/me/train.py:2"
    assert alive.chosen([package, own]) == f"{own[0]}:3"
    assert alive.shown(alive.chosen([package])) == "torch/nn.py:1"
    assert alive.chosen([]) == "" == alive.text_of("")


@pytest.mark.torch
def test_tensors_and_graphs(tmp_path: Path) -> None:
    import torch

    kept = []
    found = look(tmp_path, lambda number: kept.append(torch.ones(5_000)))
    part = found.growing[0]
    assert part.what.startswith("Tensor float32 on cpu, mostly (5000,)") and HERE in part.where
    assert part.bytes_per_step == pytest.approx(20_000, rel=0.05)
    weight = torch.ones(50, 50, requires_grad=True)
    losses = []
    found = look(tmp_path, lambda number: losses.append((torch.randn(40, 50) @ weight).tanh().sum()))
    graphs = [part for part in found.growing if "with an autograd graph" in part.what]
    assert graphs and HERE in graphs[0].where and graphs[0].bytes_per_step > 5_000


def test_gpu_memory_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's record, as it is in a snapshot: only what is in use and was asked for since."""
    frames = [
        {"filename": "/x/site-packages/torch/a.py", "line": 1, "name": "f"},
        {"filename": "/home/me/train.py", "line": 7, "name": "g"},
    ]
    blocks = [
        {"state": "active_allocated", "size": 512, "requested_size": 400, "frames": frames},
        {"state": "inactive", "size": 512, "requested_size": 400, "frames": frames},
        {"state": "active_allocated", "size": 512, "frames": []},
    ]
    asked: list[object] = []
    memory = SimpleNamespace(
        _record_memory_history=lambda enabled, **_: asked.append(enabled),
        _snapshot=lambda: {"segments": [{"blocks": blocks}, {"blocks": blocks[:1]}]},
    )
    fake = SimpleNamespace(cuda=SimpleNamespace(memory=memory, is_initialized=lambda: True))
    monkeypatch.setitem(sys.modules, "torch", fake)
    cuda = alive.Cuda()
    assert cuda.by_line() == {"/home/me/train.py:7": 800.0}
    cuda.close()
    assert asked == ["state", None]
