"""The screens, driven by keys on a terminal of 80 × 24."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from hpcdl import cli
from hpcdl.runs.scheduler import Slurm
from hpcdl.top.app import TopApp
from hpcdl.top.watch import Wanted, Watch
from hpcdl.top.widgets import Lines
from tests.runs.making import FakeJob, FakeSlurm, ago, make_run, make_submission
from tests.top.making import ended, log, running, sample, train
from tests.top.test_rows import ACTING, EVIL, evil

LIMIT_S = 30.0


class Screen:
    """An app that runs, and what is on its terminal."""

    def __init__(self, app: TopApp, pilot: Pilot[None]) -> None:
        self.app, self.pilot = app, pilot

    def lines(self) -> list[str]:
        """What stands on the terminal."""
        compositor = self.app.screen._compositor
        return ["".join(segment.text for segment in strip).rstrip() for strip in compositor.render_strips()]

    @property
    def text(self) -> str:
        return "\n".join(self.lines())

    async def until(self, seen: str | Callable[[str], bool]) -> str:
        """Waits until a text is there, or something is true of all of it."""
        end = time.monotonic() + LIMIT_S
        while not (seen in self.text if isinstance(seen, str) else seen(self.text)):
            assert time.monotonic() < end, f"{seen!r} never came:\n{self.text}"
            await self.pilot.pause(0.02)
        return self.text

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)


@contextlib.asynccontextmanager
async def shown(
    runs_dir: Path, slurm: Slurm, *queries: str, size: tuple[int, int] = (80, 24), **more: Any
) -> AsyncIterator[Screen]:
    app = TopApp(Watch(Wanted(folder=runs_dir, queries=queries, **more), slurm), every_s=0.1)
    async with app.run_test(size=size) as pilot:
        screen = Screen(app, pilot)
        await screen.until(lambda text: app.looked and "reading" not in text)
        yield screen


def local(runs_dir: Path, run_id: str, **fields: Any) -> Any:
    return running(runs_dir, run_id, kind="local", host="elsewhere", agent_pid=1, **fields)


def three(runs_dir: Path) -> None:
    first = local(runs_dir, "aaaaaaaaaaaa", name="alpha", node_list=("n1",), started=ago(500))
    train(first, range(1, 43))
    sample(first, gpus=2)
    first.event("started", node_list=["n1"])
    log(first, *(f"[rank {i % 2}] line {i}" for i in range(50)))
    local(runs_dir, "bbbbbbbbbbbb", name="beta", started=ago(100))
    ended(runs_dir, "cccccccccccc", "FAILED", name="gamma", reason="ValueError: no such file")


def test_the_table_the_run_and_back(runs_dir: Path, fake: FakeSlurm):
    three(runs_dir)

    async def drive() -> None:
        async with shown(runs_dir, fake.slurm()) as screen:
            text = await screen.until("step 42/100")
            assert [line[10:20].split()[0] for line in screen.lines()[2:5]] == ["alpha", "beta", "gamma"]
            assert "2 running · 1 failed" in text
            assert "ValueError: no such file" in text
            assert "n1  195% cpu (node 61%)  mem 5.0G of 64.0G (25% full)  gpu 87% 88%" in text
            for key in (
                "move",
                "open",
                "filter",
                "sort",
                "cancel",
                "logs",
                "events",
                "refresh",
                "help",
                "quit",
            ):
                assert key in screen.lines()[-1]
            await screen.press("enter")
            text = await screen.until("loaders")
            assert "throttled: sw_power_cap" in text
            await screen.press("l")
            await screen.until("[rank 1] line 49")  # the end of the log, and it is followed
            log_file = next((runs_dir / "alpha" / "aaaaaaaaaaaa" / "logs").iterdir())
            with log_file.open("a") as file:
                file.write(f"{ago(0)} [rank 0] a new line\n")
            await screen.until("[rank 0] a new line")
            await screen.press("home")
            await screen.until("[rank 0] line 0")
            with log_file.open("a") as file:
                file.write(f"{ago(0)} [rank 0] another\n")
            await screen.until("logs 52 lines")
            assert "[rank 0] line 0" in screen.text  # who reads further up stays there
            await screen.press("e")
            await screen.until("node_list=n1")
            await screen.press("escape")
            await screen.until("2 running · 1 failed")

    asyncio.run(drive())


def test_moving_filtering_and_sorting(runs_dir: Path, fake: FakeSlurm):
    three(runs_dir)

    async def drive() -> None:
        async with shown(runs_dir, fake.slurm()) as screen:
            await screen.press("j")
            await screen.until("beta  bbbbbbbbbbbb")
            await screen.press("down", "down", "down")
            await screen.until("gamma  cccccccccccc")
            await screen.press("k")
            await screen.until("beta  bbbbbbbbbbbb")
            await screen.press("slash", *"gam")
            await screen.until(lambda text: "/gam (1)" in text and "alpha" not in text)
            await screen.press("enter")
            await screen.press("c")  # again a key, and no letter of the filter
            await screen.until("cccccccccccc is over: FAILED")
            await screen.press("slash", *"zzz", "enter")
            await screen.until("no run has 'zzz' in it")
            await screen.press("escape")
            await screen.until("alpha")
            await screen.press("s")
            await screen.until("sorted by name")
            await screen.press("S", "S")
            await screen.until("by newest")

    asyncio.run(drive())


def test_a_terminal_that_grows_and_shrinks(runs_dir: Path, fake: FakeSlurm):
    three(runs_dir)

    async def drive() -> None:
        async with shown(runs_dir, fake.slurm()) as screen:
            for size in ((160, 50), (40, 10), (10, 3), (1, 1), (80, 24)):
                await screen.pilot.resize_terminal(*size)
                await screen.pilot.pause(0.05)
            await screen.until("q quit")
            await screen.pilot.resize_terminal(160, 50)
            await screen.until(lambda text: "nodes job" in text and "aaaaaaaaaaaa alpha" in text)
            await screen.press("enter")
            for size in ((10, 3), (80, 24)):
                await screen.pilot.resize_terminal(*size)
                await screen.pilot.pause(0.05)
            await screen.until("loaders")

    asyncio.run(drive())


def test_cancelling_asks_and_does_not_wait(runs_dir: Path, fake: FakeSlurm):
    make_submission(runs_dir, job_id="7")
    fake.jobs["7"] = [FakeJob("PENDING", tasks="0", reason="Priority")]
    make_run(runs_dir, "aaaaaaaaaaaa", job_id="7_0")
    may_answer = threading.Event()

    def run(command: Any, text: str, limit_s: float) -> Any:
        if command[0] == "scancel":
            assert may_answer.wait(LIMIT_S)
        return fake.run(command, text, limit_s)

    async def drive() -> None:
        async with shown(runs_dir, Slurm(runner=run)) as screen:
            await screen.until("Priority: other jobs come first")
            await screen.press("c")
            await screen.until("It leaves the queue.")
            await screen.press("enter")  # no yes
            await screen.until(lambda text: "It leaves" not in text)
            assert "scancel" not in fake.names()
            await screen.press("c", "y")
            await screen.until("cancelling …")
            await screen.press("question_mark")  # the keys go on while scancel hangs
            await screen.until("Ctrl-Z")
            await screen.press("escape", "q")
            await screen.until("1 run still being cancelled; q again quits")
            assert "being cancelled …" in screen.text
            may_answer.set()
            await screen.until("aaaaaaaaaaaa CANCELLED")
            await screen.until("1 cancelled")

    asyncio.run(drive())
    assert fake.names().count("scancel") == 1


def test_asking_for_a_refresh_does_not_ask_slurm_more_often(runs_dir: Path, fake: FakeSlurm):
    make_submission(runs_dir, job_id="7")
    fake.jobs["7"] = [FakeJob("RUNNING", tasks="0", start=ago(120), nodes="n1")]
    run = running(runs_dir, node_list=("n1",))

    async def drive() -> None:
        async with shown(runs_dir, fake.slurm()) as screen:
            await screen.until("Slurm asked 0s ago")
            for step in range(1, 6):
                train(run, range(step, step + 1))
                await screen.press("r")
                await screen.until(f"step {step}/100")
            await screen.until("again in")

    asyncio.run(drive())
    assert fake.names() == ["squeue"]


def test_one_run_that_was_named_is_opened(runs_dir: Path, fake: FakeSlurm):
    three(runs_dir)

    async def drive() -> None:
        async with shown(runs_dir, fake.slurm(), "bbbbbbbbbbbb") as screen:
            await screen.until("no sample yet (monitor=none writes none)")
            assert "beta" in screen.lines()[0]
            await screen.press("q")
            await screen.until("1 running")

    asyncio.run(drive())


def test_a_directory_that_goes_while_its_run_is_open(runs_dir: Path, fake: FakeSlurm):
    three(runs_dir)

    async def drive() -> None:
        async with shown(runs_dir, fake.slurm(), size=(100, 30)) as screen:
            await screen.until("alpha  aaaaaaaaaaaa")
            await screen.press("l")
            await screen.until("line 49")
            shutil.rmtree(runs_dir / "alpha")
            await screen.until("its directory is gone")
            await screen.press("escape")
            await screen.until(lambda text: "1 running · 1 failed" in text and "alpha" not in text)
            shutil.rmtree(runs_dir)
            await screen.until("no run yet in")

    asyncio.run(drive())


def test_what_others_wrote_is_shown_and_does_not_act(runs_dir: Path, fake: FakeSlurm):
    evil(runs_dir)
    local(runs_dir, "ffffffffffff", name=EVIL.replace("/", "b"))

    async def drive() -> None:
        async with shown(runs_dir, fake.slurm(), size=(200, 40)) as screen:
            await screen.until("[red]x[/]")
            for keys in (["enter"], ["l"], ["e"], ["escape"], ["c"], ["n"], ["slash", "["]):
                await screen.press(*keys)
                text = await screen.until("[red]x[")
                assert not (ACTING - {"\n"}) & set(text)

    asyncio.run(drive())


def test_a_hundred_runs_keep_the_chosen_one_in_sight(runs_dir: Path, fake: FakeSlurm):
    for i in range(100):
        local(runs_dir, f"{i:012x}", name=f"run{i:03}", started=ago(1000 - i))

    async def drive() -> None:
        async with shown(runs_dir, fake.slurm()) as screen:
            await screen.press("end")
            await screen.until("run099  000000000063")
            await screen.until(lambda text: any("run099" in line for line in text.split("\n")[2:15]))
            shutil.rmtree(runs_dir / "run000")
            await screen.until("99 running")
            assert "run099  000000000063" in screen.text
            await screen.press("home", "pagedown")
            await screen.until(lambda text: "run099" not in text)
            assert screen.app.screen.query_one(Lines).at > 5

    asyncio.run(drive())


def test_once_and_where_there_is_no_terminal(
    runs_dir: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    three(runs_dir)
    assert cli.main(["top", "--runs-dir", str(runs_dir)]) == 0
    out = capsys.readouterr().out
    assert "alpha" in out
    assert "42%" in out
    assert "\x1b" not in out
    assert cli.main(["top", "--once", "--runs-dir", str(runs_dir), "cccccccccccc"]) == 0
    assert "1 FAILED" in capsys.readouterr().out
    assert cli.main(["top", "--runs-dir", str(runs_dir), "alpah"]) == 2
    assert "nearest name: alpha" in capsys.readouterr().err


def test_a_run_that_may_not_be_read_is_said(runs_dir: Path, capsys: pytest.CaptureFixture[str]):
    three(runs_dir)
    (runs_dir / "beta" / "bbbbbbbbbbbb" / "state.json").write_text("{")
    assert cli.main(["top", "--once", "--runs-dir", str(runs_dir)]) == 0
    captured = capsys.readouterr()
    assert "alpha" in captured.out
    assert "left out" in captured.err


@pytest.mark.parametrize("colours", [True, False])
def test_on_a_real_terminal(runs_dir: Path, colours: bool):
    """In a process of its own, on a pseudo-terminal: it draws, NO_COLOR holds, and q ends it with code 0."""
    three(runs_dir)
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    environment |= {} if colours else {"NO_COLOR": "1"}
    command = [sys.executable, "-m", "hpcdl", "top", "--runs-dir", str(runs_dir)]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    said = b""
    try:
        end = time.monotonic() + LIMIT_S
        asked = False
        while process.poll() is None and time.monotonic() < end:
            if select.select([leader], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    said += os.read(leader, 65536)
            if b"alpha" in said and b"quit" in said and not asked:
                os.write(leader, b"q")
                asked = True
        assert process.poll() == 0, said.decode(errors="replace")
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    assert (
        b"\x1b[36m" in said or b";36m" in said
    ) == colours  # RUNNING is cyan, in the terminal's own colours
    assert b"38;2;" not in said
    assert re.search(rb"\x1b\[(\d+;)*7[;m]", said)  # the chosen line, with or without colours
