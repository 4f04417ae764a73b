"""Signs of life and stacks of real ranks; what the links between nodes carry."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hpcdl.launch import causes, stacks
from hpcdl.launch.hang import Hang, Limits, Watch
from hpcdl.runs import beats, kinds
from hpcdl.runs.store import RunDir
from hpcdl.worker import unable
from hpcdl.worker.preflight import Seen, carried
from tests.worker.conftest import Workers, until

pytestmark = pytest.mark.torch

TWO_NODES = {
    "env": {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"},
    "rank_env": {"0": {"SLURMD_NODENAME": "n1"}, "1": {"SLURMD_NODENAME": "n2"}},
}


def test_a_rank_in_a_gloo_collective_tells_where_it_is_and_goes_on(workers: Workers, tmp_path: Path) -> None:
    run = workers.make(trainer__max_steps=100, cluster__nodes=2)
    command: dict[str, Any] = {**TWO_NODES, "env": {**TWO_NODES["env"], beats.FOLDER: str(tmp_path)}}
    workers.start(run, 2, **command)
    until(lambda: any(beat.step >= 3 for beat in beats.listen(tmp_path)), "step 3")
    stopped = beats.listen(tmp_path)[1]
    os.kill(stopped.pid, signal.SIGSTOP)
    last = [-1, time.monotonic()]

    def silent() -> bool:
        count = beats.listen(tmp_path)[0].count
        if count != last[0]:
            last[:] = [count, time.monotonic()]
        return time.monotonic() - last[1] > 0.5

    until(silent, "rank 0 waits for rank 1")
    found = Hang(silent_s=1.0, limit_s=1.0, median_s=None, beats=tuple(beats.listen(tmp_path)))
    run.errors.mkdir(exist_ok=True)
    watch = Watch(tmp_path, Limits(factor=1, min_s=1, quiet_s=1))
    looks = watch.dump(found, run, "0.0", "n1")
    os.kill(stopped.pid, signal.SIGCONT)
    assert [look.rank for look in stacks.differing(looks)] == [1]
    assert looks[0].waits and looks[1].state == "T", looks
    assert any(frame.startswith("worker/loop.py") for frame in looks[0].frames), looks[0].frames
    finished = workers.finish(run)
    assert finished.codes == [0, 0], finished.log[-2000:]
    assert [beat.phase for beat in beats.listen(tmp_path)] == ["end", "end"]
    assert [beat.step for beat in beats.listen(tmp_path)] == [100, 100]
    (links,) = [event for event in run.events() if event["event"] == "preflight"]
    assert set(links["links_mib_per_s"]) == {"n1", "n2"} and links["slowest"] in ("n1", "n2")
    assert links["allreduce_mib_per_s"] > 0


def test_a_node_whose_link_is_too_slow_is_named(workers: Workers) -> None:
    run = workers.make(preflight__min_mib_per_s=1e9, cluster__nodes=2)
    finished = workers.go(run, 2, ok=False, **TWO_NODES)
    assert finished.codes != [0, 0]
    cause = causes.find(run, "0.0", [], "n1")
    assert cause.kind == "node" and cause.node in ("n1", "n2")
    assert "preflight.min_mib_per_s=1e+09" in cause.reason


@pytest.mark.parametrize(
    ("seconds", "slowest"),
    [([1.0, 1.0, 0.1, 0.1], "n1"), ([0.1, 1.0, 1.0, 0.1], "n2"), ([1.0, 0.1, 0.1, 1.0], "n4")],
)
def test_a_slow_node_is_slow_to_both_its_neighbours(seconds: list[float], slowest: str) -> None:
    seen = [Seen(f"n{place + 1}", one, 1.0) for place, one in enumerate(seconds)]
    by_node = carried(seen, 4.0)
    assert min(by_node, key=lambda node: by_node[node]) == slowest
    assert sorted(by_node.values()) == [4.0, 40.0, 40.0, 40.0]


def test_a_worker_that_can_not_be_imported_says_why(tmp_path: Path) -> None:
    (tmp_path / "annotated_types.py").write_text("raise ImportError('of another Python')")
    done = subprocess.run(
        [sys.executable, "-m", "hpcdl.worker.main", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "RANK": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == kinds.NEVER_RESTART == unable.NEVER_RESTART
    assert unable.CAUSE == kinds.CAUSE
    (words,) = (line for line in done.stderr.splitlines() if line.startswith(kinds.CAUSE))
    cause = causes.find(RunDir(tmp_path), "0.0", [words], "n1")
    assert (cause.kind, cause.rank) == ("fault", 3) and cause.reason.startswith(
        "ImportError: of another Python"
    )


def test_what_a_failed_rank_says_of_its_kind(workers: Workers, tmp_path: Path) -> None:
    run = workers.make(model__path=str(tmp_path / "none"))
    finished = workers.go(run, 1, ok=False)
    assert finished.codes == [78], "never restart"
    (record,) = [json.loads(file.read_text()) for file in run.errors.glob("*.json")]
    assert record["kind"] == "fault"
