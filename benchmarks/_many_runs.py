"""A folder with thousands of run directories, as launches and jobs leave them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hpcdl.runs.files import write_json
from hpcdl.runs.state import RunState
from hpcdl.runs.store import SUBMISSIONS, RunDir
from hpcdl.spec.plain import dump_yaml

SWEEP = "sweep-1a2b3c4d"
ACTIVE = 50
"""Runs in the queue: four fifths of them running."""
ARRAY = 100
"""Tasks of an array at most."""
NAMES = 30
BODIES = 64
"""Curves that the runs share: what differs is their last lines."""
ENDS = (
    *(("COMPLETED", "", 0),) * 44,
    *(("FAILED", "ValueError: loss is nan (rank 3, node c012)", 1),) * 3,
    *(("OUT_OF_MEMORY", "OutOfMemoryError: CUDA out of memory (rank 0, node c007)", 137),) * 2,
    ("CANCELLED", "cancel by student", None),
)
SEEDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What was made, and what to ask for."""

    runs_dir: Path
    slurm: Path
    """The fake Slurm's folder."""
    run_id: str
    name: str
    job_id: str
    """An array: a hundred runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run to be made."""

    number: int
    run_id: str
    name: str
    lr: float
    batch: int
    seed: int
    job: int
    """Its array's number, from 0; the one before the first has the active runs."""
    index: int
    state: str
    reason: str
    exit_code: int | None


def make(folder: Path, runs: int, points: int) -> Made:
    """Makes the runs, or takes those that a call with the same numbers has made before."""
    runs_dir, done = folder / "runs", folder / "made.json"
    plans = list(planned(runs, points))
    array = [plan for plan in plans if plan.job == plans[points + ARRAY].job]
    made = Made(
        runs_dir=runs_dir,
        slurm=folder / "slurm",
        run_id=array[0].run_id,
        name=array[0].name,
        job_id=str(_job_id(array[0].job)),
    )
    if not done.exists() or json.loads(done.read_text()) != [runs, points]:
        if runs_dir.exists():
            raise SystemExit(f"{runs_dir} holds something else: give another --keep")
        _write_all(made, plans)
        _write_sweep(runs_dir, plans[:points])
        done.write_text(json.dumps([runs, points]))
    return made


def planned(runs: int, points: int) -> Iterator[Plan]:
    """The sweep's points, the others, and the last 50 active."""
    dice = random.Random(6)
    rates = [1e-5 * 1.3**n for n in range(-(-points // (SEEDS * 10)))]
    grid = itertools.product(rates, range(8, 88, 8), range(SEEDS))
    for number in range(runs):
        if number < points:
            lr, batch, seed = next(grid)
            name = "sweep_rates"
        else:
            lr, batch, seed = 1e-4 * (1 + number % 7), 32, number
            name = f"experiment_{(number - points) // ARRAY % NAMES:02d}"
        active = runs - number <= ACTIVE
        state, reason, code = dice.choice(ENDS)
        if active:
            state, reason, code = ("RUNNING" if runs - number > ACTIVE // 5 else "PENDING"), "", None
        yield Plan(
            number=number,
            run_id=hashlib.sha256(str(number).encode()).hexdigest()[:12],
            name=name,
            lr=lr,
            batch=batch,
            seed=seed,
            job=10**6 if active else number // ARRAY,
            index=(number - (runs - ACTIVE)) if active else number % ARRAY,
            state=state,
            reason=reason,
            exit_code=code,
        )


def _write_all(made: Made, plans: Sequence[Plan]) -> None:
    spec, bodies, samples = _spec(), [_steps(n) for n in range(BODIES)], _samples()
    (made.slurm / "tasks").mkdir(parents=True)
    arrays: dict[int, list[Plan]] = {}
    for plan in plans:
        arrays.setdefault(plan.job, []).append(plan)
        run = RunDir(made.runs_dir / plan.name / plan.run_id)
        run.logs.mkdir(parents=True)
        run.errors.mkdir()
        run.write_state(_state(plan, len(plans)), durable=False)
        run.spec_file.write_text(spec.format(name=plan.name, seed=plan.seed, lr=plan.lr, batch=plan.batch))
        run.events_file.write_text(_events(plan))
        if plan.state == "PENDING":
            continue
        body, last = bodies[plan.number % BODIES]
        run.metrics_file.write_text(body + _last_lines(plan, last))
        (run.logs / "c001-try0.0.log").write_text("".join(f"step {n} loss 3.2\n" for n in range(60)))
        if plan.state == "COMPLETED":
            write_json(run.result_file, {"eval_loss_after": 3.0, "comm_share": 0.05}, durable=False)
        if plan.number % 5 == 0:
            (run.path / "system-c001.jsonl").write_text(samples)
    for job, members in arrays.items():
        _write_submission(made, job, members)


def _write_submission(made: Made, job: int, members: Sequence[Plan]) -> None:
    token = _token(job)
    folder = made.runs_dir / SUBMISSIONS / token
    folder.mkdir(parents=True)
    record = {"token": token, "job_id": str(_job_id(job)), "kind": "slurm", "name": members[0].name}
    write_json(folder / "submission.json", {**record, "created": _time(job)}, durable=False)
    (folder / "runs.txt").write_text("".join(f"{made.runs_dir / p.name / p.run_id}\n" for p in members))
    for plan in members:
        if plan.state in ("PENDING", "RUNNING"):
            task = {"state": plan.state, "restarts": 0, "reason": "Priority", "nodes": "c001"}
            file = made.slurm / "tasks" / f"{_job_id(job)}_{plan.index}.json"
            file.write_text(json.dumps({**task, "comment": f"hpcdl:{token}"}))


def _write_sweep(runs_dir: Path, plans: Sequence[Plan]) -> None:
    points = [
        {
            "overrides": f"optim.lr={plan.lr} trainer.global_batch_size={plan.batch} seed={plan.seed}",
            "run_id": plan.run_id,
            "run_dir": str(runs_dir / plan.name / plan.run_id),
        }
        for plan in plans
    ]
    record = {"sweep": SWEEP, "name": plans[0].name, "created": _time(0), "points": points, "refused": []}
    (runs_dir / ".sweeps").mkdir()
    write_json(runs_dir / ".sweeps" / f"{SWEEP}.json", record)


def _state(plan: Plan, runs: int) -> RunState:
    started = None if plan.state == "PENDING" else _time(plan.number + 5)
    active = plan.state in ("PENDING", "RUNNING")
    return RunState(
        run_id=plan.run_id,
        name=plan.name,
        state=plan.state,  # type: ignore[arg-type]
        reason=plan.reason,
        kind="slurm",
        job_id=f"{_job_id(plan.job)}_{plan.index}" if started else None,
        submission=_token(plan.job),
        array_index=plan.index,
        nodes=1,
        world_size=4,
        max_steps=400,
        running_try="0.0" if started else "",
        node_list=("c001",) if started else (),
        host="c001" if started else None,
        agent_pid=4711 if started else None,
        agent_started=1.7e9 if started else None,
        exit_code=plan.exit_code,
        created=_time(plan.number - runs),
        started=started,
        ended=None if active else _time(plan.number + 900),
    )


def _spec() -> str:
    """A spec.yaml with room for what differs, from the tests' experiment with all its keys."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from hpcdl.spec.plain import to_plain
    from tests.factory import tiny_spec

    plain = to_plain(
        tiny_spec(
            cluster__kind="slurm", cluster__nodes=1, cluster__processes_per_node=4, trainer__max_steps=400
        )
    )
    text = dump_yaml(plain).replace("{", "{{").replace("}", "}}")
    for key, field in (("name: tiny\n", "name"), ("seed: 0\n", "seed"), ("  lr: 0.01\n", "lr")):
        assert text.count(key) == 1, key
        text = text.replace(key, f"{key.partition(':')[0]}: {{{field}}}\n")
    assert text.count("global_batch_size: 8") == 1
    return text.replace("global_batch_size: 8", "global_batch_size: {batch}")


def _steps(number: int) -> tuple[str, int]:
    """200 to 400 lines of metrics.jsonl, and the last one's step."""
    dice = random.Random(number)
    count = 200 + 200 * number // BODIES
    lines = []
    for step in range(1, count + 1):
        loss = 3 + 2 * math.exp(-step / 60) + dice.gauss(0, 0.05)
        lines.append(json.dumps(_line(step, loss, dice.gauss(12_000, 300))))
    return "".join(f"{line}\n" for line in lines), count


def _last_lines(plan: Plan, step: int) -> str:
    """What tells this run's result: best at a learning rate and a batch in the middle, and by the seed."""
    dice = random.Random(plan.number)
    loss = 3 + 0.1 * math.log(plan.lr / 2e-4) ** 2 + 0.002 * plan.batch + dice.gauss(0, 0.02)
    evaluated = {"step": step + 1, "eval_loss": loss + 0.1, "eval_perplexity": math.exp(loss + 0.1)}
    rate = dice.gauss(9_000 + 60 * plan.batch, 200)
    return f"{json.dumps(_line(step + 1, loss, rate))}\n{json.dumps({**evaluated, 'time': _time(step)})}\n"


def _line(step: int, loss: float, rate: float) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "grad_norm": 1.2480300599838987,
        "lr": 0.00010000205312435434,
        "tokens": 8192 * step,
        "tokens_per_s": round(rate, 2),
        "step_s": round(8192 / rate, 6),
        "mfu": 0.31,
        "peak_memory_bytes": 449642496,
        "time": _time(step),
    }


def _events(plan: Plan) -> str:
    events = [
        {"time": _time(plan.number), "event": "submitted", "attempt": 0, "submission": _token(plan.job)}
    ]
    if plan.state != "PENDING":
        events.append({"time": _time(plan.number + 5), "event": "started", "try": "0.0", "nodes": 1})
        events += [
            {"time": _time(plan.number + 60 * n), "event": "checkpoint", "step": 100 * n, "seconds": 2.1}
            for n in (1, 2)
        ]
    return "".join(f"{json.dumps(event)}\n" for event in events)


def _samples() -> str:
    """A hundred samples of one node with four ranks, as the monitor writes them."""
    from hpcdl.monitor.records import NodeSample, ProcessSample, as_line

    lines = []
    for number in range(100):
        ranks = tuple(
            ProcessSample(pid=1000 + r, role="rank", rank=r, rss_bytes=10**9 + number, cpu_percent=99.0)
            for r in range(4)
        )
        rss = 4 * 10**9 + number
        sample = NodeSample(
            time=_time(number), node="c001", rss_bytes=rss, peak_rss_bytes=rss, processes=ranks
        )
        lines.append(json.dumps(as_line(sample)))
    return "".join(f"{line}\n" for line in lines)


def _job_id(job: int) -> int:
    return 400_000 + job


def _token(job: int) -> str:
    return hashlib.sha256(f"submission {job}".encode()).hexdigest()[:12]


def _time(seconds: float) -> str:
    return (datetime(2026, 11, 1, tzinfo=UTC) + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")
