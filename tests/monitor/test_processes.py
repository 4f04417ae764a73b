"""Real processes with children; and a /proc that says little."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcdl.monitor.processes import Processes, Tree, pss_bytes, stat
from hpcdl.monitor.records import ProcessSample
from hpcdl.runs.beats import Heart
from tests.launch.making import until

PR_SET_CHILD_SUBREAPER = 36
# `torchrun`: starts two ranks with a loader each, says their numbers, ends them with itself.
TORCHRUN = """
import os, subprocess, sys, time
ranks = [
    subprocess.Popen(
        [sys.executable, "-c", sys.argv[1]],
        env={**os.environ, "RANK": str(number)}, stdout=subprocess.PIPE, text=True,
    )
    for number in (4, 5)
]
for rank in ranks:
    print(rank.pid, rank.stdout.readline().strip(), flush=True)
sys.stdin.read()
for rank in ranks:
    rank.kill()
"""
RANK = """
import subprocess, sys, time
held = bytearray(30_000_000)
busy = "import time\\nwhile True: sum(range(50_000)); time.sleep(0.005)"
loader = subprocess.Popen([sys.executable, "-c", busy])
print(loader.pid, flush=True)
time.sleep(600)
"""


class Running:
    """A torchrun with its ranks, below this process."""

    def __init__(self) -> None:
        self.torchrun = subprocess.Popen(
            [sys.executable, "-c", TORCHRUN, RANK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.torchrun.stdout is not None
        pairs = [self.torchrun.stdout.readline().split() for _ in range(2)]
        self.ranks = [int(rank) for rank, _ in pairs]
        self.loaders = [int(loader) for _, loader in pairs]

    def close(self) -> None:
        for pid in (*self.loaders, *self.ranks):
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                pass
        self.torchrun.communicate()


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    started = Running()
    yield started
    started.close()


def by_pid(samples: list[ProcessSample]) -> dict[int, ProcessSample]:
    return {sample.pid: sample for sample in samples}


def ticks(pid: int) -> int:
    found = stat("/proc", pid)
    assert found is not None
    return found.ticks


def test_every_process_has_its_role_and_what_it_uses(running: Running, tmp_path: Path) -> None:
    until(lambda: ticks(running.loaders[0]) > 10, "a loader that has run for longer than a moment")
    processes, ticks_then = Processes(running.torchrun.pid, tmp_path), ticks(running.loaders[0])
    before = by_pid(processes.sample())
    until(lambda: ticks(running.loaders[0]) > ticks_then + 5, "CPU time to count")
    found = by_pid(processes.sample({running.ranks[1]: 7}))
    assert found[os.getpid()].role == "agent" and found[running.torchrun.pid].role == "torchrun"
    for number, rank, loader in zip((4, 5), running.ranks, running.loaders, strict=True):
        assert (found[rank].role, found[rank].rank, found[rank].step) == ("rank", number, None)
        assert (found[loader].role, found[loader].rank) == ("loader", number)
        assert (found[rank].rss_bytes or 0) > 30_000_000 > (found[loader].rss_bytes or 0) > 1_000_000
        assert 1_000_000 < (found[rank].file_bytes or 0) < (found[rank].rss_bytes or 0) - 30_000_000
        assert found[rank].threads == 1 and (found[rank].open_files or 0) >= 3
        assert found[rank].read_bytes is not None and found[rank].written_bytes is not None
    idle, busy = found[running.ranks[0]].cpu_percent, found[running.loaders[0]].cpu_percent
    assert idle is not None and busy is not None and idle < busy < 115
    assert before[running.loaders[0]].cpu_percent is not None, "since it began"
    assert [found[rank].gpu_memory_bytes for rank in running.ranks] == [None, 7]
    assert [sample.role for sample in processes.sample()][:4] == ["rank", "rank", "loader", "loader"]


def test_a_rank_says_what_it_is_at(running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getpid", lambda: running.ranks[0])
    Heart(tmp_path, 4, 0).say("evaluation", 17)
    monkeypatch.undo()
    found = by_pid(Processes(running.torchrun.pid, tmp_path).sample())[running.ranks[0]]
    assert (found.rank, found.step, found.phase) == (4, 17, "evaluation")


def test_a_loader_that_outlives_its_rank_is_still_that_ranks(tmp_path: Path) -> None:
    """The agent adopts orphans: here this process does."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    started = Running()
    try:
        processes = Processes(started.torchrun.pid, tmp_path)
        processes.sample()
        os.kill(started.ranks[0], 9)
        role = until(
            lambda: [
                one for one in processes.sample() if one.pid == started.loaders[0] and one.role == "other"
            ],
            "an orphan",
        )
        assert role[0].rank == 4
        assert started.ranks[0] not in by_pid(processes.sample()), "it has ended, though nobody has asked how"
    finally:
        started.close()
        os.waitpid(started.loaders[0], 0)
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def test_pss_shares_out_what_is_shared() -> None:
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    pss = pss_bytes(os.getpid())
    assert pss is not None and 1_000_000 < pss <= 1.1 * rss
    assert pss_bytes(2**22 + 1) is None, "gone"


def fake(proc: Path, pid: int, parent: int, state: str = "S", **files: str) -> None:
    """A process that only says what it must: as with hidepid, or another user's."""
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    rest = f"{state} {parent} 1 1 0 -1 0 0 0 0 0 700 300 0 0 20 0 3 0 {100 * pid} 5000 9"
    (folder / "stat").write_text(f"{pid} (odd ) name (x) {rest}")
    for name, text in files.items():
        (folder / name).write_text(text)


def test_what_cannot_be_read_is_not_known_and_no_error(tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    fake(proc, 1, 0)
    fake(proc, 10, 1)
    fake(proc, 11, 10, status="Name:\tx\nVmRSS:\t     4 kB\nRssAnon: 3 kB\n", io="rchar: 5\nread_bytes: 6\n")
    fake(proc, 12, 10, state="Z")
    (proc / "13").mkdir()  # gone between two reads
    (proc / "14").mkdir()
    (proc / "14" / "stat").write_text("14 (half")
    fake(proc, 20, 1)
    fake(proc, 21, 99)  # its parent can't be seen
    samples = Processes(11, tmp_path, agent=10, proc=str(proc)).sample()
    torchrun, agent = samples
    assert (torchrun.pid, torchrun.role, torchrun.threads) == (11, "torchrun", 3)
    assert (torchrun.rss_bytes, torchrun.file_bytes) == (4096, None)
    assert (torchrun.read_bytes, torchrun.written_bytes, torchrun.open_files) == (6, None, None)
    assert (agent.pid, agent.rss_bytes, agent.read_bytes) == (10, None, None)


def test_what_is_no_part_of_the_run_is_looked_at_once_a_minute(tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    for pid, parent in ((1, 0), (10, 1), (20, 1), (21, 20), (30, 99)):
        fake(proc, pid, parent)
    tree = Tree(10, str(proc))
    assert list(tree.look()) == [10]
    for name in ("20", "21", "30"):  # as if each of them were another process by now
        (proc / name / "stat").write_text(f"{name} (x) S 10 " + "0 " * 30)
    assert list(tree.look()) == [10, 30], "one whose parent isn't known is looked at again"
    tree._forget_at = 0.0
    assert set(tree.look()) == {10, 20, 21, 30}


def test_no_proc_at_all(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        Processes(11, tmp_path, agent=10, proc=str(tmp_path / "none")).sample()
