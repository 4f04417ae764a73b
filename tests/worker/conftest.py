"""Workers for tests: started by fork (see zygote.py), each in a run directory of its own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hpcdl.runs.store import RunDir
from hpcdl.spec.plain import dump_yaml, to_plain
from tests.factory import tiny_spec


def coverage_environment() -> dict[str, str]:
    """Where workers put their part of the coverage, if it is measured at all."""
    try:
        import coverage
    except ImportError:
        return {}
    current = coverage.Coverage.current()
    return {} if current is None else {"TEST_COVERAGE_FILE": os.path.abspath(current.config.data_file)}  # noqa: PTH100


@dataclass
class Finished:
    run: RunDir
    codes: list[int]
    log: str

    def losses(self) -> list[float]:
        return [m["loss"] for m in self.run.metrics() if "loss" in m]

    def evaluations(self) -> dict[int, float]:
        return {m["step"]: m["eval_loss"] for m in self.run.metrics() if "eval_loss" in m}

    def outcome(self) -> dict[str, Any]:
        return dict(json.loads(self.run.outcome_file.read_text()))

    def result(self) -> dict[str, Any]:
        return dict(json.loads(self.run.result_file.read_text()))


class Workers:
    """The zygote's other end."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self._folder = folder
        self._count = itertools.count()
        env = {**os.environ, "HPCDL_CACHE": str(cache), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        env |= coverage_environment()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.worker.zygote"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        self._going: list[int] = []
        assert self._read() == {"ready": True}

    def make(self, **dotted: Any) -> RunDir:
        """A run directory of the tiny experiment, one thread a process."""
        dotted = {"trainer__threads_per_process": 1, **dotted}
        run = RunDir(self._folder / "tiny" / f"run{next(self._count)}")
        run.path.mkdir(parents=True)
        run.spec_file.write_text(dump_yaml(to_plain(tiny_spec(**dotted))))
        return run

    def start(self, run: RunDir, ranks: int = 1, **command: Any) -> list[int]:
        """Pids of the workers; `finish` must follow. What a failed test has left is ended."""
        if self._going:
            for pid in self._going:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._read()
        wanted = {"run": str(run.path), "ranks": ranks, "log": str(run.path / "log.txt"), **command}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        self._going = list(self._read()["pids"])
        return list(self._going)

    def finish(self, run: RunDir) -> Finished:
        codes = self._read()["codes"]
        self._going = []
        return Finished(run, codes, (run.path / "log.txt").read_text())

    def go(self, run: RunDir, ranks: int = 1, *, ok: bool = True, **command: Any) -> Finished:
        """Starts the workers and waits for their end; all must succeed where `ok`."""
        self.start(run, ranks, **command)
        finished = self.finish(run)
        if ok:
            assert finished.codes == [0] * ranks, finished.log[-3000:]
        return finished

    def train(self, ranks: int = 1, **dotted: Any) -> Finished:
        return self.go(self.make(**dotted), ranks)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the zygote has died"
        return dict(json.loads(line))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Workers]:
    zygote = Workers(tmp_path_factory.mktemp("runs"), cache)
    yield zygote
    zygote.close()


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCDL_CACHE", str(cache))


def until(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Waits for a condition; fails with `what` when it doesn't come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for: {what}"
        time.sleep(0.005)
