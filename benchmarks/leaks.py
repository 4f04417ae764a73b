"""How sure is the search for leaks? Real processes that leak, and real ones that only look like it.

Each case of `_leaks/` is a process of its own: a loop of 2,000 steps of a few milliseconds that really allocates. It is
sampled every 50 ms, the samples go through the same watcher that a node's agent has, and the process answers its
questions as a rank does. A case counts as called a leak where the watcher has written its event by the end.

Half of the cases were looked at while the detector was made, the other half (`held out`) only afterwards; what that
showed became a rule, and `fresh` cases were written after it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_leaks"))

import fresh  # noqa: E402
import healthy  # noqa: E402
import leaking  # noqa: E402
import psutil  # noqa: E402
import work  # noqa: E402
from _results import leave  # noqa: E402

from hpcdl.monitor.records import NodeSample, ProcessSample  # noqa: E402
from hpcdl.monitor.watching import Settings, Watcher  # noqa: E402
from hpcdl.runs import beats  # noqa: E402
from hpcdl.runs.store import RunDir  # noqa: E402

GOAL = 0.95
GROUPS = ("seen", "held out", "fresh")
EVERY_S = 0.05
PACE_S = 0.004
NODE = "here"


@dataclass
class Case:
    """One case, and what came of it."""

    name: str
    leaks: bool
    group: str
    folder: Path
    steps: int
    process: subprocess.Popen[bytes] | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    samples: list[NodeSample] = field(default_factory=list)

    def start(self) -> None:
        """Starts the process, and what watches it."""
        self.run = RunDir(self.folder / "run")
        self.run.path.mkdir()
        settings = Settings(last_step=self.steps)
        self._watcher = Watcher(settings, self.run, NODE, "0.0", self.folder, self.said.append)
        argv = [sys.executable, str(HERE / "_leaks" / "child.py")]
        self.process = subprocess.Popen(
            [*argv, self.name, str(self.folder), str(self.steps), str(PACE_S)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "LEAKS_TMP": str(self.folder)},
            stderr=(self.folder / "stderr").open("wb"),
        )

    def look(self) -> bool:
        """Takes a sample; False once it is over."""
        assert self.process is not None
        if self.process.poll() is not None:
            self._watcher.close()
            self.events = self.run.events()
            if self.process.returncode:
                sys.exit(f"{self.name}: {(self.folder / 'stderr').read_text()}")
            return False
        sample = self._sample(self.process.pid)
        if sample is not None:
            self._watcher.take(sample)
            if sample.processes:
                self.samples.append(sample)
        return True

    def _sample(self, pid: int) -> NodeSample | None:
        said = beats.listen(self.folder)
        if not said:
            return None
        processes = []
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in [pid, *map(int, children)]:
            if memory := memory_of(each):
                mine = {"step": said[0].step, "phase": said[0].phase} if each == pid else {}
                role = "rank" if each == pid else "loader"
                processes.append(
                    ProcessSample(
                        pid=each, role=role, rank=0, rss_bytes=memory[0], file_bytes=memory[1], **mine
                    )
                )
        return NodeSample(
            time=datetime.now(UTC).isoformat(),
            node=NODE,
            attempt="0.0",
            memory_available_bytes=psutil.virtual_memory().available,
            processes=tuple(processes),
        )

    @property
    def found(self) -> dict[str, Any] | None:
        """The first event of a leak."""
        return next((each for each in self.events if each["event"] == "leak"), None)

    @property
    def right(self) -> bool:
        return (self.found is not None) == self.leaks

    @property
    def names_the_line(self) -> bool | None:
        """Whether the line that leaks stands among those that grow; None where no line of Python does."""
        step = {**leaking.LEAKS, **leaking.HELD_OUT, **fresh.LEAKS}.get(self.name)
        if self.found is None or step is None:
            return None
        file = Path(inspect.getfile(step)).name
        told = " ".join(f"{part['where']} {part['what']}" for part in self.found["growing"])
        lines, first = inspect.getsourcelines(step)
        own = {f"{file}:{first + at}" for at, line in enumerate(lines) if "# LEAK" in line}
        return bool(own & set(re.findall(rf"{re.escape(file)}:\d+", told))) if own else None


def memory_of(pid: int) -> tuple[int, int] | None:
    """Resident bytes, and of these those of mapped files."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    if "VmRSS" not in fields:
        return None
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["RssFile"].split()[0]) * 1024


def run_all(cases: list[Case], at_once: int) -> None:
    """Some at a time: they sleep most of their time."""
    waiting, going = list(cases), list[Case]()
    while waiting or going:
        while waiting and len(going) < at_once:
            going.append(waiting.pop(0))
            going[-1].start()
        began = time.monotonic()
        for case in list(going):
            if not case.look():
                going.remove(case)
                print(line(case), flush=True)
        time.sleep(max(0.0, began + EVERY_S - time.monotonic()))


def line(case: Case) -> str:
    """A row of the table."""
    true = work.RATES.get(case.name)
    found = case.found
    told = f"{found['bytes_per_step']:,.0f}" if found else "-"
    step = f"{found['step']}" if found else "-"
    named = {True: "yes", False: "no", None: "-"}[case.names_the_line]
    note = "" if case.right else ("  MISSED" if case.leaks else "  FALSE ALARM")
    what = found["growing"][0]["what"][:60] if found and found["growing"] else ""
    group = (case.group, "leak" if case.leaks else "healthy")
    return (
        f"{case.name:36} {group[0]:9} {group[1]:8} {'leak' if found else 'none':5}"
        f" {f'{true:,.0f}' if true else '-':>9} {told:>9} {step:>6} {named:>5}  {what}{note}"
    )


def totals(cases: list[Case]) -> tuple[float, float]:
    """Precision and recall."""
    right = sum(case.leaks and case.found is not None for case in cases)
    called = sum(case.found is not None for case in cases)
    return right / max(1, called), right / max(1, sum(case.leaks for case in cases))


def record(cases: list[Case], path: Path) -> None:
    """Thinned series for the tests: `{name, leaks, group, last_step, points: [[step, phase, KiB, loaders…]]}`.

    Step and KiB are told as what they are more than before.
    """
    rows = []
    for case in cases:
        thin = case.samples[:: max(1, -(-len(case.samples) // 220))]
        points, step, own = [], 0, 0
        for sample in thin:
            rank = sample.processes[0]
            kib = [round((each.rss_bytes - each.file_bytes) / 1024) for each in sample.processes]
            points.append([rank.step - step, beats.PHASES.index(rank.phase), kib[0] - own, *kib[1:]])
            step, own = rank.step, kib[0]
        rows.append(json.dumps({"name": case.name, "leaks": case.leaks, "group": case.group,
                                "last_step": case.steps, "points": points}, separators=(",", ":")))  # fmt: skip
    path.write_text("\n".join(sorted(rows)) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=GROUPS, help="these cases")
    parser.add_argument("--case", action="append", help="this case (again for more)")
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--steps", type=int, default=work.STEPS)
    parser.add_argument("--record", type=Path, help="where to leave the series")
    args = parser.parse_args()
    tables = (
        (leaking.LEAKS, True, "seen"), (healthy.HEALTHY, False, "seen"),
        (leaking.HELD_OUT, True, "held out"), (healthy.HELD_OUT, False, "held out"),
        (fresh.LEAKS, True, "fresh"), (fresh.HEALTHY, False, "fresh"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="hpcdl-leaks-") as place:
        cases = []
        for table, leaks, group in tables:
            for name in table:
                if args.only in (None, group) and (not args.case or name in args.case):
                    folder = Path(place) / name
                    folder.mkdir()
                    cases.append(Case(name, leaks, group, folder, args.steps))
        print(
            f"{'case':36} {'':9} {'is':8} {'told':5} {'true B':>9} {'est. B':>9} {'step':>6} {'line':>5}  what grows"
        )
        run_all(cases, args.at_once)
    if args.record:
        record(cases, args.record)
    worst = 1.0
    for label in ("seen", "held out", "fresh", "all"):
        some = [case for case in cases if label in (case.group, "all")]
        if some:
            precision, recall = totals(some)
            steps = sorted(case.found["step"] for case in some if case.leaks and case.found)
            median = steps[len(steps) // 2] if steps else 0
            print(
                f"{label}: {sum(c.leaks for c in some)} leaks, {sum(not c.leaks for c in some)} healthy:"
                f" precision {precision:.3f}, recall {recall:.3f}; told at step {median} of {args.steps} (median)"
            )
            worst = min(precision, recall)  # of all, which come last
    lines = [case.names_the_line for case in cases if case.names_the_line is not None]
    print(f"the line that leaks named: {sum(lines)} of {len(lines)}")
    for case in cases:
        for said in case.said if not case.right or not case.leaks else ():
            print(f"{case.name}: {said}")
    figures = [
        {"name": each.name, "leaks": each.leaks, "group": each.group, "right": each.right} for each in cases
    ]
    leave(figures, [(f"precision and recall at least {GOAL}; {worst:.3f}", worst >= GOAL)])
    return 0 if worst >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
