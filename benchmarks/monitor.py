#!/usr/bin/env python3
"""What does the monitor cost a training step, and what does it take by itself?

One run (two ranks of a tiny Llama, two DataLoader workers each) trains all the time, with `monitor=none`. A sampler as
each agent has one looks at its processes in turns: some seconds with it, some without, the order turning in each
pair. A ratio is that of a pair: of its median steps, and of the CPU time that the ranks and loaders take for a step,
which tells more where other work runs, too. A second series samples a hundred times as often, as a magnifying glass.
Then the sampler's own CPU time, beside trees of more processes.

    python benchmarks/monitor.py
    python benchmarks/monitor.py --pairs 20 --turn-s 30
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median

from _results import tell
from _timing import Ratio, machine, markdown, paired_ratio

from hpcdl.monitor import records, sampler
from hpcdl.monitor.processes import Processes, pss_bytes, read, stat
from hpcdl.monitor.sampler import Look, Sampler, Settings
from hpcdl.runs.beats import FOLDER, listen
from hpcdl.runs.store import RunDir

GOAL = 1.01
START_S = 180.0
OFTEN = 100
TREES = (10, 30, 100, 300)
"""Processes; 8 ranks with 2 loaders each, torchrun and the agent are 26."""
PARENT = """
import subprocess, sys
below = [subprocess.Popen(["sleep", "600"]) for _ in range(int(sys.argv[1]))]
print("ready", flush=True)
sys.stdin.read()
for process in below:
    process.kill()
"""
TRAINING = (
    "+experiment=pretrain_tiny", "cluster=local", "cluster.processes_per_node=2", "data.workers=2", "monitor=none",
    "trainer.max_steps=1000000", "trainer.log_every=1", "trainer.eval_every=0", "trainer.eval_samples=2",
    "trainer.checkpoint_every=0", "optim.warmup_steps=0", "task.sample_prompt=''", "parsable=true",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=8, help="turns with and without (default: %(default)s)")
    parser.add_argument("--turn-s", type=float, default=10.0, help="length of a turn (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    table, results = [], []
    with tempfile.TemporaryDirectory(prefix="hpcdl-bench-") as folder, training(Path(folder)) as run:
        for name, every_s in (("monitor=default", 5.0), (f"{OFTEN} times as often", 5.0 / OFTEN)):
            one = beside(run, Path(folder), every_s, args.pairs, args.turn_s)
            ratios = [f"{each.median:.4f} ({each.low:.4f}–{each.high:.4f})" for each in (one.wall, one.cpu)]
            table.append([name, *ratios, str(one.wall.n), f"{1e3 * one.step_s:.0f} ms", f"{one.own:.3%}"])
            results.append(one)
    trees = [alone(n) for n in TREES]
    where = machine()
    busy = where["load_1min"] > 2 * where["cpus"] + 2  # the training itself is a load of two
    judged = results[0].cpu if busy else results[0].wall
    by = "CPU time: THE MACHINE WAS BUSY" if busy else "wall time"
    goal = f"a step with monitor=default at most {GOAL:.2f} × one without; {judged.median:.4f}, by {by}"
    beside_it = ("", "step with ÷ without", "its CPU time", "pairs", "a step", "sampler, of a core")
    by_itself = ("processes", "a sample", "every 5 s, of a core", "PSS of all")
    text = "\n\n".join((markdown(beside_it, table), markdown(by_itself, trees), f"goal: {goal}; {where}"))
    report = {"machine": where, "beside": [asdict(one) for one in results], "alone": trees}
    return tell(report, text, [(goal, judged.median <= GOAL)], as_json=args.json)


@contextmanager
def training(folder: Path) -> Iterator[RunDir]:
    """A run that trains until the block ends."""
    argv = (sys.executable, "-m", "hpcdl.launch", *TRAINING, f"runs_dir={folder}/runs")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        wait_for(lambda: list((folder / "runs").glob("*/*/metrics.jsonl")), folder)
        (metrics,) = (folder / "runs").glob("*/*/metrics.jsonl")
        run = RunDir(metrics.parent)
        wait_for(lambda: run.step() > 20, folder)
        yield run
        run.stop_file.write_text("cancel\n")
        wait_for(lambda: run.read_state().state not in ("PENDING", "RUNNING"), folder)
    finally:
        process.terminate()
        process.wait()


def wait_for(condition: Callable[[], object], folder: Path) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(
                f"the training didn't come so far in {START_S:.0f} s:\n{(folder / 'log').read_text()[-2000:]}"
            )
        time.sleep(0.2)


@dataclass(frozen=True)
class Turn:
    """A while with the sampler, or without."""

    begin: float
    end: float
    sampled: bool
    cpu_s: float
    """Of the ranks and loaders, a step."""


@dataclass(frozen=True)
class Result:
    """Steps beside a sampler ÷ steps without."""

    wall: Ratio
    cpu: Ratio
    step_s: float
    own: float
    """CPU seconds of the sampler a second."""


def beside(run: RunDir, folder: Path, every_s: float, pairs: int, turn_s: float) -> Result:
    """The steps of a run beside a sampler, and without."""
    agent = run.read_state().agent_pid
    assert agent is not None
    tree = Processes(-1, folder, agent=agent).sample()
    torchrun = next(
        one.pid for one in tree if Path(f"/proc/{one.pid}/stat").read_text().split()[3] == str(agent)
    )
    signs = signs_of(tree)
    processes = Processes(torchrun, signs, agent=agent)
    roles = [one.role for one in processes.sample()]
    assert roles.count("rank") == 2 and roles.count("loader") >= 4, roles
    settings = Settings(every_s=every_s, pss_every_s=60.0, bytes_per_day=1e12)
    watched = [one.pid for one in processes.sample() if one.role in ("rank", "loader")]
    used, lasted, turns = 0.0, 0.0, []
    for number in range(pairs):
        for sampled in (True, False) if number % 2 else (False, True):
            first, cpu_then = at_a_step(signs), cpu_s(watched)
            begin, own = time.time(), time.process_time()
            with Sampler(settings if sampled else None, run, f"bench-{every_s:g}", "0.0", processes):
                time.sleep(turn_s)
                own = time.process_time() - own
            steps, cpu_now = at_a_step(signs) - first, cpu_s(watched)
            turns.append(Turn(begin, time.time(), sampled, (cpu_now - cpu_then) / steps))
            used, lasted = used + sampled * own, lasted + sampled * turn_s
    steps_taken = [
        (datetime.fromisoformat(line["time"]).timestamp(), line["step_s"])
        for line in run.metrics()
        if "loss" in line and not line.get("profiled")
    ]
    took = [[of(turn, steps_taken) for turn in turns if turn.sampled == sampled] for sampled in (True, False)]
    cpu = [[turn.cpu_s for turn in turns if turn.sampled == sampled] for sampled in (True, False)]
    return Result(wall=paired_ratio(*took), cpu=paired_ratio(*cpu), step_s=median(took[1]), own=used / lasted)


def at_a_step(signs: Path) -> int:
    """Waits for the end of a step of the first rank; how many it has done then."""
    before = listen(signs)[0].step
    while (now := listen(signs)[0].step) == before:
        time.sleep(0.002)
    return now


def cpu_s(pids: list[int]) -> float:
    """CPU seconds of processes so far."""
    found = [stat("/proc", pid) for pid in pids]
    return sum(each.ticks for each in found if each) / os.sysconf("SC_CLK_TCK")


def signs_of(tree: list[records.ProcessSample]) -> Path:
    """Where the ranks give their signs of life."""
    for one in tree:
        for pair in read(f"/proc/{one.pid}/environ").split(b"\0"):
            if pair.startswith(FOLDER.encode() + b"="):
                return Path(pair.partition(b"=")[2].decode())
    raise AssertionError("no rank has a folder for its signs")


def of(turn: Turn, steps: list[tuple[float, float]]) -> float:
    """The median of the steps that lie in a turn as a whole."""
    return median(took for end, took in steps if turn.begin < end - took and end < turn.end)


def alone(count: int) -> list[str]:
    """The sampler's CPU time for a tree of so many processes, all of which wait."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(count - 2)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    processes = Processes(parent.pid, Path("/nowhere"))
    look = Look(Settings(every_s=5.0, pss_every_s=1e9, bytes_per_day=1e9), processes)
    pids = [one.pid for one in look.sample().processes]
    with_pss = timed(lambda: [pss_bytes(pid) for pid in pids])
    takes = []
    for _ in range(30):
        began = time.thread_time()
        json.dumps(records.as_line(look.sample()))
        takes.append(time.thread_time() - began)
    parent.communicate()
    usual = median(takes)
    return [str(count), f"{1e3 * usual:.2f} ms", f"{usual / 5:.3%}", f"{1e3 * with_pss:.1f} ms"]


def timed(call: Callable[[], object]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


if __name__ == "__main__":
    sampler._CPU_SHARE = 1.0  # the magnifying glass: no limit but every_s
    sys.exit(main())
