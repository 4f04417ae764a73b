"""Three runs train while one fault after another is done to them; a table tells what became of each."""

from __future__ import annotations

import random
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.chaos.faults import FAULTS, Fault, Victim
from tests.slurm.cluster import ROOT, Cluster, Launched
from tests.slurm.test_runs import STEADY, TINY

HOOK = "/hpcdl/" + str((ROOT / "tests" / "chaos" / "hook").relative_to(ROOT))
PACE_S, AHEAD_S = 0.3, 2.0
"""Each step takes so much longer while there are faults to come: the two cores have time for what recovers. A run that
has done its steps for the faults so far, while another one waits for Slurm, goes on slowly."""
STEPS_A_FAULT = 40
EVERY = 20
"""Steps between checkpoints."""
RECOVERS_S = 600.0
TOLERANCE = 1e-5
"""Of a loss, relative, where a try had another shape; tests/worker/test_tolerance.py: a lost update makes 5e-4."""
COMMON = (*TINY, *STEADY, f"trainer.checkpoint_every={EVERY}", "cluster.requeue=auto")
ALIVE = ("PENDING", "RUNNING", "COMPLETED", "UNKNOWN")


@dataclass(frozen=True)
class Trainee:
    """One of the three runs: its shape, and the shape of the undisturbed run that it is compared with."""

    name: str
    words: tuple[str, ...]
    calm: str
    """Name of the undisturbed run, in `CALM`."""
    nodes: int
    """That it begins with. Where a try had fewer, the losses are equal within rounding only."""


CALM = {
    "ddp": ("parallel=ddp", "cluster.nodes=1", "cluster.processes_per_node=2"),
    "fsdp": ("parallel=fsdp", "cluster.nodes=1", "cluster.processes_per_node=2"),
}
TRAINEES = (
    Trainee("ddp, 1 node × 2", CALM["ddp"], "ddp", 1),
    Trainee("ddp, 2 nodes × 1", ("parallel=ddp", "cluster.nodes=2"), "ddp", 2),
    Trainee("fsdp, 1 to 2 nodes", ("parallel=fsdp", "cluster.nodes=2", "cluster.min_nodes=1"), "fsdp", 2),
)


@dataclass(frozen=True)
class Chapter:
    """A fault, whom it is done to, and on which of its nodes."""

    fault: Fault
    trainee: int
    node: int
    """Modulo the nodes that it has then."""


def plan(seed: int, length: int) -> list[Chapter]:
    """Faults in a random order, each one once before one comes twice."""
    dice = random.Random(seed)
    chapters: list[Chapter] = []
    while len(chapters) < length:
        for fault in dice.sample(FAULTS, len(FAULTS)):
            chapters.append(
                Chapter(fault, dice.choice((1, 2) if fault.many_nodes else (0, 1, 2)), dice.randrange(2))
            )
    return chapters[:length]


@dataclass
class Told:
    """A line of the table."""

    fault: str
    run: str
    recovered_s: float
    """From the fault until all three had done a step that they hadn't done before it."""
    steps_lost: int
    """Done before the fault and done again after it, over all three."""
    what: list[str]
    """What the events say was done about it."""


@dataclass
class Story:
    """Three runs on a cluster."""

    cluster: Cluster
    faults: int
    """How many are to come."""
    runs: list[Launched] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)

    @property
    def max_steps(self) -> int:
        """Enough that all three still train at the last fault."""
        return STEPS_A_FAULT * (self.faults + 1)

    def begin(self) -> None:
        """Starts all three, slowed down, and waits until each has trained."""
        self.cluster.shell("mkdir -p disk")
        self._pace()
        hook = (f"cluster.env.PYTHONPATH={HOOK}", f"cluster.env.CHAOS_DISK={self.cluster.home}/disk")
        for trainee in TRAINEES:
            words = (*COMMON, *trainee.words, *hook, "trainer.keep_last=3", "cluster.partition=low")
            self.runs.append(self.cluster.launch_one(*words, f"trainer.max_steps={self.max_steps}"))
        for run in self.runs:
            self._wait_beyond(run, EVERY + 1)

    def _pace(self) -> None:
        self._set_pace(f"{PACE_S} {AHEAD_S} {STEPS_A_FAULT * (len(self.told) + 1)}")

    def _set_pace(self, words: str) -> None:
        self.cluster.shell(f"echo {words} >disk/pace.new; mv disk/pace.new disk/pace")

    def tell(self, chapter: Chapter) -> None:
        """Does one fault, and waits until all train again; what it did is undone whatever happens."""
        fault, run = chapter.fault, self.runs[chapter.trainee]
        self._pace()
        if self._over(run):
            self.told.append(
                Told(fault.name, TRAINEES[chapter.trainee].name, 0.0, 0, ["not tried: it was over"])
            )
            return
        self._wait_training(run)
        self._wait_checkpoints(run, fault.checkpoints)
        if fault.at_checkpoint:
            self._wait_near_checkpoint(run)
        nodes = self._started(run)["node_list"]
        victim = Victim(self.cluster, run, nodes, nodes[chapter.node % len(nodes)])
        seen = [self._events(each) for each in self.runs]
        begun = time.monotonic()
        with fault.harm(victim):
            reached = [self._step(each) for each in self.runs]
            if fault.event is not None:
                told = self._wait_event(run, fault.event, seen[chapter.trainee])
                reached[chapter.trainee] = max(reached[chapter.trainee], told.get("step", 0))
            for each, step in zip(self.runs, reached, strict=True):
                self._wait_training(each)
                self._wait_beyond(each, max(step, self._step(each)))
            took = time.monotonic() - begun
        new = [self._events(each)[len(old) :] for each, old in zip(self.runs, seen, strict=True)]
        lost = sum(_done_twice(events) for events in new)
        what = [_in_words(event) for events in new for event in events if event["event"] in TOLD]
        self.told.append(Told(fault.name, TRAINEES[chapter.trainee].name, took, lost, what))
        print(row(len(self.told), self.told[-1]), flush=True)

    def end(self) -> None:
        """All three run to their end at full speed, then the undisturbed ones; the losses must be equal."""
        self._set_pace("0 0 0")
        self.cluster.wait_done(self.runs, limit_s=900)
        calm = {
            name: self.cluster.launch_one(
                *COMMON, *words, "trainer.keep_last=2", f"trainer.max_steps={self.max_steps}"
            )
            for name, words in CALM.items()
        }
        self.cluster.wait_done(calm.values(), limit_s=900)
        expected = {name: self.cluster.losses(run) for name, run in calm.items()}
        for trainee, run in zip(TRAINEES, self.runs, strict=True):
            losses = self.cluster.losses(run)
            assert list(losses) == list(range(1, self.max_steps + 1)), "each step once, none left out"
            same = all(len(event["node_list"]) == trainee.nodes for event in self._all(run, "started"))
            wanted = expected[trainee.calm]
            if same:
                assert losses == wanted, f"{trainee.name}: not bit for bit\n{self.cluster.story(run.run_id)}"
            else:
                assert losses == pytest.approx(wanted, rel=TOLERANCE), self.cluster.story(run.run_id)
            print(
                f"{trainee.name}: {len(losses)} losses equal {'bit for bit' if same else f'within {TOLERANCE:.0e}'}"
            )

    def _step(self, run: Launched) -> int:
        path = shlex.quote(f"{run.run_dir}/metrics.jsonl")
        text = self.cluster.shell(f"grep -o '\"step\": *[0-9]*' {path} | tail -n 1", check=False).strip()
        return int(text.split(":")[1]) if text else 0

    def _events(self, run: Launched) -> list[dict[str, Any]]:
        return self.cluster.lines(f"{run.run_dir}/events.jsonl")

    def _all(self, run: Launched, kind: str) -> list[dict[str, Any]]:
        return [event for event in self._events(run) if event["event"] == kind]

    def _started(self, run: Launched) -> dict[str, Any]:
        return self._all(run, "started")[-1]

    def _state(self, run: Launched) -> str:
        status = self.cluster.status(run.run_id)  # which also asks Slurm to start a requeued job now
        assert status["state"] in ALIVE, self.cluster.story(run.run_id)
        return str(status["state"])

    def _over(self, run: Launched) -> bool:
        return self._state(run) == "COMPLETED"

    def _wait_training(self, run: Launched) -> None:
        """Until the try that Slurm has started last is the one that trains: a run that is told to stop does a few
        more steps, and its job's nodes are then those of nobody."""

        def trains() -> bool | None:
            if self._over(run):
                return True
            life = [event["event"] for event in self._events(run) if event["event"] in (*BEGUN, *ENDED)]
            return True if life and life[-1] in BEGUN else None

        self.cluster.until(trains, f"{run.run_id} trains", RECOVERS_S, lambda: self.cluster.story(run.run_id))

    def _wait_beyond(self, run: Launched, step: int) -> None:
        def reached() -> bool | None:
            return True if self._step(run) > step or self._over(run) else None

        self.cluster.until(
            reached, f"{run.run_id} beyond step {step}", RECOVERS_S, lambda: self.cluster.story(run.run_id)
        )

    def _wait_event(
        self, run: Launched, kinds: Sequence[str], seen: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        def there() -> dict[str, Any] | None:
            self._state(run)
            return next((e for e in self._events(run)[len(seen) :] if e["event"] in kinds), None)

        return self.cluster.until(
            there, f"another {kinds} of {run.run_id}", RECOVERS_S, lambda: self.cluster.story(run.run_id)
        )

    def _wait_checkpoints(self, run: Launched, number: int) -> None:
        count = f"ls {shlex.quote(run.run_dir)}/checkpoints/step-*/trainer.json 2>/dev/null | wc -l"
        self.cluster.until(
            lambda: True if int(self.cluster.shell(count)) >= number else None, f"{number} checkpoints"
        )

    def _wait_near_checkpoint(self, run: Launched) -> None:
        self.cluster.until(
            lambda: True if self._step(run) % EVERY in NEAR else None, "a checkpoint is due soon"
        )


NEAR = range(EVERY - 6, EVERY - 1)
"""Steps after the last checkpoint: the next one comes while the disk is full, at either pace, and not before."""
BEGUN = ("started", "resumed")
ENDED = ("restarting", "requeued", "lost", "stopping")
TOLD = ("restarting", "requeued", "lost", "checkpoint_failed", "warning", "hang")


def _done_twice(events: Sequence[dict[str, Any]]) -> int:
    """Steps between where a try ended and where the next one went on."""
    twice, ended = 0, 0
    for event in events:
        if event["event"] in ENDED:
            ended = event.get("step", 0)
        if event["event"] == "resumed":
            twice += max(0, ended - event["step"])
    return twice


def _in_words(event: dict[str, Any]) -> str:
    way = event.get("way") or ("in place" if event["event"] == "restarting" else "")
    text = event.get("reason") or event.get("message") or event.get("text") or ""
    return f"{event['event']}{f' ({way})' if way else ''}: {str(text)[:70]}"


def row(number: int, told: Told) -> str:
    """A line of the table."""
    cells = (
        f"{number:>2}",
        f"{told.fault:<27}",
        f"{told.run:<19}",
        f"{told.recovered_s:>7.1f}",
        f"{told.steps_lost:>5}",
    )
    return "  ".join((*cells, "; ".join(told.what)))


def table(title: str, told: Sequence[Told], planned: int) -> str:
    """What was done, and what became of it."""
    tried = [each for each in told if each.recovered_s]
    head = f"{'#':>2}  {'fault':<27}  {'run':<19}  {'s':>7}  {'lost':>5}  what hpcdl did"
    rows = [row(number, each) for number, each in enumerate(told, 1)]
    worst = max((each.recovered_s for each in tried), default=0.0)
    lost = sum(each.steps_lost for each in tried)
    last = (
        f"{planned} faults planned, {len(tried)} tried and survived; {lost} steps lost; "
        f"{sum(each.recovered_s for each in tried):.0f} s to recover, the longest {worst:.0f} s"
    )
    return "\n".join((title, head, *rows, last))
